//! The targets: one file each, and one for all control messages.

use crate::Target;

mod arguments;
mod auth;
mod client_core;
mod cluster_files;
mod control;
mod cs_core;
mod cs_tag;
mod cutter;
mod data;
mod frames;
mod mds_core;
mod meta_command;
mod nbd;
mod raft_log;
mod raft_message;
mod repository;
mod store_disk;
mod tls_files;

/// All of them, in the order of the table.
pub static TARGETS: &[Target] = &[
    frames::TARGET,
    cutter::TARGET,
    auth::TARGET,
    data::TARGET,
    control::MDS_CALL,
    control::MDS_REPLY,
    control::MDS_PUSH,
    control::IMAGE_PIECE,
    control::CS_CALL,
    control::CS_REPLY,
    raft_message::TARGET,
    nbd::TARGET,
    store_disk::TARGET,
    cs_tag::TARGET,
    raft_log::TARGET,
    meta_command::TARGET,
    cs_core::TARGET,
    mds_core::TARGET,
    client_core::TARGET,
    repository::TARGET,
    cluster_files::TARGET,
    arguments::TARGET,
    tls_files::TARGET,
];
