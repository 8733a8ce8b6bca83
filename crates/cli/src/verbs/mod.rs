//! One file per group of verbs.

pub mod attr;
pub mod auth;
pub mod backup;
pub mod cluster;
pub mod cs;
pub mod doctor;
pub mod mds;
pub mod mount;
pub mod nbd;
pub mod recover;
pub mod removal;
pub mod sim;
pub mod upgrade;
pub mod volume;
