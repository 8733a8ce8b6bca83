//! What goes into a recovery and what it says of itself.

use cairn_types::{
    BLOCK_SIZE_U64, ChunkId, ChunkVersion, ClusterId, CsId, Epoch, HostId, Level, MdsId, Redundancy, VolumeId,
    format_size,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

/// One copy of a chunk that a chunk server holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundCopy {
    /// The chunk.
    pub chunk: ChunkId,
    /// Its volume.
    pub volume: VolumeId,
    /// Its place in the volume.
    pub index: u64,
    /// Version of the copy.
    pub version: ChunkVersion,
    /// Blocks it spans.
    pub block_count: u32,
    /// Blocks that hold data.
    pub mapped_blocks: u32,
    /// One past the last block that holds data; known where the copy has the highest index of its volume on the
    /// server.
    pub end_block: Option<u32>,
    /// Complete at its version; false while it was being rebuilt.
    pub whole: bool,
}

/// All that one chunk server knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Its id; none when it never registered.
    pub cs: Option<CsId>,
    /// Uuid of its store.
    pub store: [u8; 16],
    /// Identity of its host.
    pub host: HostId,
    /// Tier.
    pub tier: u8,
    /// Its directory.
    pub repository: String,
    /// Bytes it can store.
    pub capacity: u64,
    /// Bytes taken.
    pub used: u64,
    /// Highest epoch seen of each volume: fenced, settled or in the tail.
    pub epochs: Vec<(VolumeId, Epoch)>,
    /// Its copies.
    pub copies: Vec<FoundCopy>,
    /// Other chunk servers that its copies mention.
    pub mentioned: Vec<CsId>,
}

/// What the operator wants.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the cluster.
    pub name: String,
    /// Where the first metadata server will listen.
    pub addr: SocketAddr,
    /// Its directory.
    pub repository: String,
    /// Redundancy of volumes of which nothing else is known; else as many copies as were found.
    pub redundancy: Option<Redundancy>,
    /// Volumes of unknown kind that become block volumes; all others become files.
    pub block_volumes: BTreeSet<VolumeId>,
    /// All volumes of unknown kind become block volumes.
    pub all_block_volumes: bool,
    /// The time now.
    pub wall_ns: u64,
}

/// Why nothing can be recovered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// No chunk server was given.
    #[error("no chunk server was given: name the directory of each, or the file `cairn cs scan` made of it")]
    NoServers,
    /// The backup is of a later release.
    #[error("the backup is of release {0}, this is an older one: recover with the release that ran the cluster")]
    LaterRelease(Level),
    /// Servers of different clusters.
    #[error("{one} and {other} are of different clusters")]
    TwoClusters {
        /// A directory.
        one: String,
        /// Another.
        other: String,
    },
    /// One server twice, or a copy of one.
    #[error(
        "{one} and {other} are the same chunk server (or one is a copy of the other); give the one that served last"
    )]
    Twice {
        /// A directory.
        one: String,
        /// Another.
        other: String,
    },
    /// Two stores claim one id.
    #[error("{repository} says it is {cs}, and so does another store; which one the cluster knew cannot be told")]
    TwoStores {
        /// The id.
        cs: CsId,
        /// The directory.
        repository: String,
    },
    /// The backup is of another cluster.
    #[error("the backup is of cluster {backup}, the chunk servers are of {servers}")]
    OtherBackup {
        /// Cluster of the backup.
        backup: String,
        /// Cluster of the servers.
        servers: ClusterId,
    },
}

/// How a volume came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecoveredVolume {
    /// Its id.
    pub volume: VolumeId,
    /// Where it is found now: a path on the mount, or the name of a block volume.
    pub name: String,
    /// A block volume rather than a file.
    pub block_volume: bool,
    /// Its size in bytes.
    pub size: u64,
    /// Its chunks.
    pub chunks: u64,
}

/// Something an operator should look at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Problem {
    /// No complete copy of a chunk was found: what it held cannot be read.
    Lost {
        /// The volume.
        volume: VolumeId,
        /// Place in it.
        index: u64,
        /// The chunk.
        chunk: ChunkId,
        /// Where incomplete copies are.
        servers: Vec<CsId>,
    },
    /// The complete copies of a chunk are on servers that were not given: it waits for them.
    Waits {
        /// The volume.
        volume: VolumeId,
        /// Place in it.
        index: u64,
        /// The chunk.
        chunk: ChunkId,
        /// The servers.
        servers: Vec<CsId>,
    },
    /// Fewer complete copies than writes need.
    BelowMinimum {
        /// The volume.
        volume: VolumeId,
        /// Place in it.
        index: u64,
        /// The chunk.
        chunk: ChunkId,
        /// Complete copies.
        found: usize,
        /// Needed.
        minimum: usize,
    },
    /// A chunk of the backup of which no server has a copy: dropped since, or never written; it reads as zeros.
    GoneSinceBackup {
        /// The volume.
        volume: VolumeId,
        /// Place in it.
        index: u64,
        /// The chunk.
        chunk: ChunkId,
    },
    /// Two chunks claim one place: the one allocated last is used, the other is kept and not reachable.
    Superseded {
        /// The volume.
        volume: VolumeId,
        /// Place in it.
        index: u64,
        /// The older chunk.
        chunk: ChunkId,
        /// Where it is.
        servers: Vec<CsId>,
    },
    /// A volume has more data than the backup says: it grew; its size is now a multiple of a block.
    Grown {
        /// The volume.
        volume: VolumeId,
        /// Size in the backup.
        before: u64,
        /// Size now.
        now: u64,
    },
    /// Copies that fit nothing, kept and not reachable.
    Odd {
        /// The volume they say they belong to.
        volume: VolumeId,
        /// The chunk.
        chunk: ChunkId,
        /// The server.
        server: CsId,
    },
    /// A chunk server the cluster had and that was not given.
    ServerNotGiven {
        /// The server.
        server: CsId,
        /// Its directory, where that is known.
        repository: String,
    },
    /// A chunk server that the backup knows as removed: its copies were left out.
    ServerRemoved {
        /// The server.
        server: CsId,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |servers: &[CsId]| servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Lost { volume, index, chunk, servers } => write!(
                f,
                "LOST: {volume} index {index} ({chunk}): no complete copy; incomplete ones on {} are kept, reads fail",
                list(servers)
            ),
            Self::Waits { volume, index, chunk, servers } => {
                write!(f, "waits: {volume} index {index} ({chunk}) is on {}, not given; I/O waits", list(servers))
            }
            Self::BelowMinimum { volume, index, chunk, found, minimum } => write!(
                f,
                "few copies: {volume} index {index} ({chunk}) has {found} complete, {minimum} needed; writes wait for copying"
            ),
            Self::GoneSinceBackup { volume, index, chunk } => {
                write!(f, "gone: {volume} index {index} ({chunk}) of the backup is on no server; it reads as zeros")
            }
            Self::Superseded { volume, index, chunk, servers } => {
                write!(f, "older: {volume} index {index}: {chunk} on {} gave way to a later chunk", list(servers))
            }
            Self::Grown { volume, before, now } => {
                write!(f, "grown: {volume} had {before} bytes in the backup and has {now} now, rounded up to a block")
            }
            Self::Odd { volume, chunk, server } => write!(f, "odd: {chunk} on {server} fits nothing in {volume}; kept"),
            Self::ServerNotGiven { server, repository } if repository.is_empty() => {
                write!(f, "not given: {server}")
            }
            Self::ServerNotGiven { server, repository } => write!(f, "not given: {server} in {repository}"),
            Self::ServerRemoved { server } => write!(f, "removed before the backup: {server}; its copies are left out"),
        }
    }
}

/// What was recovered and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The cluster.
    pub cluster: ClusterId,
    /// Id of the first metadata server.
    pub mds: MdsId,
    /// Log index of the new state.
    pub index: u64,
    /// Names and attributes came from a backup.
    pub from_backup: bool,
    /// Files and directories, the root and what was made for the recovery included.
    pub inodes: u64,
    /// Block volumes.
    pub block_volumes: u64,
    /// Chunk servers read, with their copies.
    pub servers: Vec<(CsId, String, u64)>,
    /// Chunks in the new maps.
    pub chunks: u64,
    /// Of these: with fewer complete copies than normal.
    pub degraded: u64,
    /// Copies at an old version, or incomplete, that are kept.
    pub stale_copies: u64,
    /// Volumes with chunks and without a name, which got one.
    pub nameless: Vec<RecoveredVolume>,
    /// What to look at.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Nothing is lost and nothing waits for a server, as far as this can be seen.
    pub fn is_whole(&self) -> bool {
        let is_loss = |problem: &Problem| {
            matches!(problem, Problem::Lost { .. } | Problem::Waits { .. } | Problem::ServerNotGiven { .. })
        };
        !self.problems.iter().any(is_loss)
    }
}

/// What never comes back without a backup.
const NEVER: &str = "names, directories, owners, permissions, times, links and extended attributes; sizes below a block \
                     (files end at a multiple of 4 KiB); which volume was a file and which a block volume; redundancy, \
                     failure domain and tier of volumes; parameters, the key-value store, events; sessions and locks; \
                     files without data";
/// What does not come back with one.
const SINCE: &str = "what changed in names, attributes and parameters since the backup: files made since then have no \
                     name, files removed since then are back (empty where their chunks are gone); sessions and locks";

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = if self.from_backup { "a backup and" } else { "no backup, only" };
        writeln!(f, "Metadata of cluster {} from {source} {} chunk servers:", self.cluster, self.servers.len())?;
        for (cs, repository, copies) in &self.servers {
            writeln!(f, "  {cs:<9} {copies:>9} copies  {repository}")?;
        }
        writeln!(
            f,
            "{} files and directories, {} block volumes, {} chunks; {} chunks have fewer copies than they should, {} old or \
             incomplete copies are kept",
            self.inodes, self.block_volumes, self.chunks, self.degraded, self.stale_copies
        )?;
        if !self.nameless.is_empty() {
            writeln!(f, "Volumes without a name, and the names they got:")?;
        }
        for volume in &self.nameless {
            let kind = if volume.block_volume { "block volume" } else { "file" };
            let (id, size) = (volume.volume, format_size(volume.size.next_multiple_of(BLOCK_SIZE_U64)));
            writeln!(f, "  {id:<9} {kind} {} ({size}, {} chunks)", volume.name, volume.chunks)?;
        }
        if !self.problems.is_empty() {
            writeln!(f, "To look at:")?;
        }
        for problem in &self.problems {
            writeln!(f, "  {problem}")?;
        }
        write!(f, "Cannot come back: {}.", if self.from_backup { SINCE } else { NEVER })
    }
}
