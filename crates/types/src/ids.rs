//! Identifiers. Every kind is a type of its own, so that a chunk is never taken for a volume.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(
    /// A metadata server. Ids start at 1 and are never reused in a cluster; this is also its Raft node id.
    MdsId, u64, "MDS#"
);
id!(
    /// A chunk server. Ids start at 1025 and are never reused; a wiped disk joins as a new server.
    CsId, u32, "CS#"
);
id!(
    /// A client session. Ids start at 2049; a client that reconnects after its session ended gets a new one.
    ClientId, u64, "CL#"
);
id!(
    /// A volume: a sparse address space of bytes. A file's content is a volume whose id equals its [`InodeId`].
    VolumeId, u64, "vol#"
);
id!(
    /// A layer of a volume; a volume without snapshots has one.
    LayerId, u64, "layer#"
);
id!(
    /// A chunk of one layer of one volume at one index. Never reused.
    ChunkId, u64, "chunk#"
);
id!(
    /// A node of the namespace tree. The root directory is 1.
    InodeId, u64, "ino#"
);
id!(
    /// The epoch of a lease: monotonic per volume. Rule 1 of the design: fencing is by epoch, not by clock.
    Epoch, u64, "epoch "
);
id!(
    /// The version of a chunk, decided only by the MDS. Rule 2: only the current version counts.
    ChunkVersion, u64, "v"
);
id!(
    /// The number of a write within one epoch of one volume, given by the lease holder, monotonic, starting at 1.
    Sequence, u64, "seq "
);

impl InodeId {
    /// The root directory of the namespace.
    pub const ROOT: InodeId = InodeId(1);
}

impl VolumeId {
    /// The volume that holds the content of file `inode`.
    pub fn of_inode(inode: InodeId) -> VolumeId {
        VolumeId(inode.0)
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseHexIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let text = text.trim();
                if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(ParseHexIdError { text: text.to_owned() });
                }
                let mut bytes = [0u8; 16];
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16)
                        .map_err(|_| ParseHexIdError { text: text.to_owned() })?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

hex_id!(
    /// Identity of a cluster, drawn at `make-mds -I`. A message of another cluster is refused whatever its name
    /// (R0045).
    ClusterId
);
hex_id!(
    /// Identity of a host, file `host_id`; the allocator tells hosts apart by it (R0078). Printed as 32 hex digits
    /// (D15).
    HostId
);

/// A text that is not 32 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not an id of 32 hexadecimal digits")]
pub struct ParseHexIdError {
    text: String,
}

/// Any process that speaks on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum NodeId {
    /// A metadata server.
    Mds(MdsId),
    /// A chunk server.
    Cs(CsId),
    /// A client session; zero before the MDS has given it an id.
    Client(ClientId),
}
