//! Keys of the ordered store: one letter for the table, then big-endian numbers, so that order of bytes is order of
//! numbers. The table of tables: `docs/formats/metadata.md`.

use cairn_types::{ChunkId, ClientId, CsId, InodeId, VolumeId};

/// Resident singletons (written at checkpoints).
pub const GLOBALS: u8 = b'A';
/// Chunk server (written at checkpoints).
pub const SERVER: u8 = b'B';
/// Session (written at checkpoints).
pub const SESSION: u8 = b'C';
/// State of balancing: one record.
pub const BALANCE: u8 = b'Y';
/// Directory entry: directory, hash of the name, name.
pub const DENTRY: u8 = b'D';
/// Event: number.
pub const EVENT: u8 = b'E';
/// Inode that is going: its chunks and attributes are being freed.
pub const GARBAGE: u8 = b'G';
/// Server, or server 0 for the cluster: how full it was last said to be.
pub const FILL: u8 = b'F';
/// Open handle: inode, session.
pub const HANDLE: u8 = b'H';
/// Inode.
pub const INODE: u8 = b'I';
/// Job that gives the chunks of a volume a new redundancy: inode.
pub const RETARGET: u8 = b'J';
/// Chunk: volume, index.
pub const CHUNK: u8 = b'K';
/// Lease: session, volume.
pub const LEASE: u8 = b'L';
/// Metadata server: what ails it; metadata server 0: who leads, from which term.
pub const AILING: u8 = b'M';
/// Block volume by name.
pub const NAME: u8 = b'N';
/// Order: chunk server, chunk.
pub const ORDER: u8 = b'O';
/// Job that looks at all chunks of a server again: chunk server.
pub const SWEEP: u8 = b'P';
/// Repair queue: priority, due, volume, index.
pub const QUEUE: u8 = b'Q';
/// Key-value store of the services.
pub const USER: u8 = b'U';
/// Copy of the set with a damaged block: chunk server, chunk.
pub const DAMAGED: u8 = b'R';
/// Last known start of a chunk server's store.
pub const LINEAGE: u8 = b'T';
/// Replica: chunk server, volume, index.
pub const REPLICA: u8 = b'X';
/// Place of a chunk of which a server has a copy, in the set or not: chunk server, chunk.
pub const COPY: u8 = b'k';
/// Open handle: session, inode.
pub const HANDLE_OF: u8 = b'h';
/// Extended attribute: inode, name.
pub const XATTR: u8 = b'x';

/// Table and one number.
pub fn one(table: u8, a: u64) -> [u8; 9] {
    let mut key = [table; 9];
    key[1..].copy_from_slice(&a.to_be_bytes());
    key
}

/// Table and two numbers.
pub fn two(table: u8, a: u64, b: u64) -> [u8; 17] {
    let mut key = [table; 17];
    key[1..9].copy_from_slice(&a.to_be_bytes());
    key[9..].copy_from_slice(&b.to_be_bytes());
    key
}

/// Table and bytes.
pub fn bytes(table: u8, bytes: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + bytes.len());
    key.push(table);
    key.extend_from_slice(bytes);
    key
}

/// An inode.
pub fn inode(inode: InodeId) -> [u8; 9] {
    one(INODE, inode.0)
}

/// A chunk of a volume.
pub fn chunk(volume: VolumeId, index: u64) -> [u8; 17] {
    two(CHUNK, volume.0, index)
}

/// A replica on a server.
pub fn replica(cs: CsId, volume: VolumeId, index: u64) -> [u8; 21] {
    let mut key = [REPLICA; 21];
    key[1..5].copy_from_slice(&cs.0.to_be_bytes());
    key[5..13].copy_from_slice(&volume.0.to_be_bytes());
    key[13..].copy_from_slice(&index.to_be_bytes());
    key
}

/// A copy on a server, in the set or not.
pub fn copy(cs: CsId, chunk: ChunkId) -> [u8; 13] {
    cs_and_chunk(COPY, cs, chunk)
}

/// Table, chunk server, chunk.
fn cs_and_chunk(table: u8, cs: CsId, chunk: ChunkId) -> [u8; 13] {
    let mut key = [table; 13];
    key[1..5].copy_from_slice(&cs.0.to_be_bytes());
    key[5..].copy_from_slice(&chunk.0.to_be_bytes());
    key
}

/// A damaged copy on a server.
pub fn damaged(cs: CsId, chunk: ChunkId) -> [u8; 13] {
    cs_and_chunk(DAMAGED, cs, chunk)
}

/// An order for a server.
pub fn order(cs: CsId, chunk: ChunkId) -> [u8; 13] {
    cs_and_chunk(ORDER, cs, chunk)
}

/// A chunk server.
pub fn server(table: u8, cs: CsId) -> [u8; 5] {
    let mut key = [table; 5];
    key[1..].copy_from_slice(&cs.0.to_be_bytes());
    key
}

/// A lease of a session.
pub fn lease(client: ClientId, volume: VolumeId) -> [u8; 17] {
    two(LEASE, client.0, volume.0)
}

/// An entry of the repair queue.
pub fn queue(priority: u8, due_ns: u64, volume: VolumeId, index: u64) -> [u8; 26] {
    let mut key = [QUEUE; 26];
    key[1] = priority;
    key[2..10].copy_from_slice(&due_ns.to_be_bytes());
    key[10..18].copy_from_slice(&volume.0.to_be_bytes());
    key[18..].copy_from_slice(&index.to_be_bytes());
    key
}

/// Length of a directory entry's key before the name.
pub const DENTRY_PREFIX: usize = 16;

/// Everything of a directory entry's key but the name: the hash has 55 bits, see [`name_hash`].
pub fn dentry_prefix(parent: InodeId, hash: u64) -> [u8; DENTRY_PREFIX] {
    let mut key = [DENTRY; DENTRY_PREFIX];
    key[1..9].copy_from_slice(&parent.0.to_be_bytes());
    key[9..].copy_from_slice(&hash.to_be_bytes()[1..]);
    key
}

/// A directory entry.
pub fn dentry(parent: InodeId, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(DENTRY_PREFIX + name.len());
    key.extend_from_slice(&dentry_prefix(parent, name_hash(parent, name)));
    key.extend_from_slice(name);
    key
}

/// An extended attribute.
pub fn xattr(inode: InodeId, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(9 + name.len());
    key.extend_from_slice(&one(XATTR, inode.0));
    key.extend_from_slice(name);
    key
}

/// The first key after all that begin with `prefix`.
pub fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // Only a prefix of 0xff bytes has no successor; table letters are ASCII, so there is none.
    vec![u8::MAX; 64]
}

/// Big-endian number at `at`.
pub fn number(key: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(key[at..at + 8].try_into().expect("eight bytes"))
}

/// 55 bits of hash of a name within its directory, the highest always set, so that a cookie made of it is positive as
/// an `off_t` and never one of the small numbers front ends use for `.` and `..`. Two rounds of folded multiplication,
/// in the manner of wyhash; the order of a listing is the order of these hashes.
pub fn name_hash(parent: InodeId, name: &[u8]) -> u64 {
    fn fold(a: u64, b: u64) -> u64 {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    }
    let mut hash = fold(parent.0 ^ 0x2d35_8dcc_aa6c_78a5, 0x8bb8_4b93_962e_acc9);
    for piece in name.chunks(8) {
        let mut word = [0u8; 8];
        word[..piece.len()].copy_from_slice(piece);
        hash = fold(hash ^ u64::from_le_bytes(word), 0x4b33_a62e_d433_d4a3).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    let hash = fold(hash ^ name.len() as u64, 0x2d35_8dcc_aa6c_78a5);
    (hash >> 9) | 1 << 54
}
