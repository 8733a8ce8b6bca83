//! The chunk store: everything one disk of a chunk server holds, as a core without IO.
//!
//! Blocks of 4 KiB are written to free slots, never over live ones. A group of changes is one header slot directly
//! followed by its data: one device write. The index (16 bytes a block) is paged; checkpoints write changed pages to
//! new places, and recovery replays the chain of groups after the last checkpoint. Problem, choices, failures and
//! figures: `docs/design/store.md`; every byte: `docs/formats/store.md`.
//!
//! Invariants: a flush makes everything answered before it durable (I1). What survives a crash is a prefix of the log
//! (I4). A block read is one that was written there, or an error, never something else (I2, I10). After a failed write
//! or flush nothing is answered until the store was opened anew (I12). A full store goes on deleting and fencing (I16).
//! No bytes on the disk can make it panic (I19).
//!
//! How to drive it: [`format()`] once; [`Store::new`], [`Store::start`]; then hand [`StoreOutput::disk`] to the disk
//! after every call and bring completions to [`Store::disk_done`] until [`StoreOutput::opened`] is set. From then on
//! [`Store::submit`] as many requests as there are, then [`Store::turn`] once.

mod api;
mod bitmap;
mod checkpoint;
mod chunks;
pub mod doctor;
mod engine;
mod format;
mod layout;
mod leaf;
mod read;
mod reader;
mod recovery;
mod rewriter;
mod space;
mod state;
mod store;
mod tail;
mod tree;
mod volumes;
mod write;

pub use api::{
    ChangedRange, ErrorAction, FormatError, Notice, OpenError, OpenReport, REQUEST_BLOCKS_MAX, ReadData, StoreConfig,
    StoreError, StoreOptions, StoreOutput, StoreReply, StoreRequest, StoreStats,
};
pub use chunks::ChunkInfo;
pub use format::format;
pub use layout::superblock::{LABEL_BYTES, SuperblockError};
pub use layout::{CHUNK_BLOCKS_MAX, FORMAT_VERSION, LEAF_BLOCKS, SLOTS_MAX, SLOTS_MIN, TAG_BYTES_MAX, VERSION_MAX};
pub use store::Store;
pub use volumes::TailEntry;
