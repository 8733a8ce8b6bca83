//! The chunk server: one disk, one process, all copies of chunks on it.
//!
//! [`CsCore`] is the sans-IO process around the chunk store of `cairn-store`: fencing, versions, durable marks,
//! rebuilds, scrub, and the link to the metadata servers. Invariants it guards: I5 (no lower epoch becomes visible once
//! fenced), I7 (only the current version serves or is a source), the exactness of durable marks (rule 3), and that a
//! copy under rebuild is never taken for a complete one. Start reading at [`core`]; why it is as it is:
//! `docs/design/chunk-server.md`.

pub mod core;
mod lineage;
mod links;
mod marks;
pub mod repository;
pub mod scan;
pub mod shell;
pub mod tag;

pub use self::core::{CsConfig, CsCore, StartReport};
pub use links::WINDOW_MAX;
pub use repository::{CsIdentity, MakeCs, Repository, RepositoryError, make_cs, read_identity};
pub use shell::{CsRunConfig, CsRunError, RunningCs, run, start};
