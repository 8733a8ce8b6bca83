//! The targets, one file each.

use crate::Target;

mod arguments;
mod auth;
mod client_core;
mod cluster_files;
mod control;
mod cs_call;
mod cs_core;
mod cs_reply;
mod cs_tag;
mod cutter;
mod data;
mod frames;
mod image_piece;
mod mds_call;
mod mds_core;
mod mds_push;
mod mds_reply;
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
    mds_call::TARGET,
    mds_reply::TARGET,
    mds_push::TARGET,
    image_piece::TARGET,
    cs_call::TARGET,
    cs_reply::TARGET,
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
