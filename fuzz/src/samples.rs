//! One message of every kind, made by the real encoders: where the corpora begin.

use crate::Seeds;
use cairn_stdx::checksum::crc64;
use cairn_types::{
    BLOCK_SIZE, ChunkId, ChunkVersion, ClientId, ClusterId, CsId, Epoch, FailureDomain, HostId, InodeId, LayerId,
    Level, MdsId, NodeId, Redundancy, Sequence, VolumeId,
};
use cairn_wire::auth::{ClusterKey, Initiator, Peer};
use cairn_wire::cs::{BlockRange, CsError, CsReply, CsRequest, TailEntry};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus, FLAG_DURABLE, FLAG_ZERO};
use cairn_wire::mds::*;
use serde::Serialize;
use std::net::SocketAddr;

/// The cluster of all samples.
pub const CLUSTER: ClusterId = ClusterId([7; 16]);

/// Messages with names.
pub type Named<T> = Vec<(&'static str, T)>;

/// Named messages as bytes.
pub fn encoded<T: Serialize>(messages: Named<T>) -> Seeds {
    messages.iter().map(|(name, message)| ((*name).to_owned(), cairn_wire::encode(message))).collect()
}

/// The cluster key.
pub fn key() -> ClusterKey {
    ClusterKey::from_hex(&"5a".repeat(32)).expect("64 digits")
}

/// A node of this release.
pub fn at_present(node: NodeId) -> Peer {
    Peer { node, level: Level::CURRENT }
}

/// A client that opens a link.
pub fn initiator(cluster: Option<ClusterId>) -> Initiator {
    Initiator::new(key(), "stor1", cluster, at_present(NodeId::Client(ClientId(9))), [1; 32])
}

/// Somebody of another cluster.
pub fn stranger() -> Initiator {
    Initiator::new(key(), "stor2", None, at_present(NodeId::Cs(CsId(1025))), [3; 32])
}

/// The proof that belongs to [`initiator`] and the challenge of the target `auth`.
pub fn proof() -> Vec<u8> {
    let initiator = initiator(Some(CLUSTER));
    let node = at_present(NodeId::Mds(MdsId(1)));
    let (challenge, _) =
        cairn_wire::auth::Responder::answer(&key(), "stor1", CLUSTER, node, [2; 32], &initiator.hello());
    initiator.challenged(&challenge).expect("our own challenge is good").0
}

/// An address on this machine.
pub fn addr(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn attr(inode: u64, kind: InodeKind) -> Attr {
    Attr {
        inode: InodeId(inode),
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        size: 1 << 20,
        allocated: 1 << 19,
        rdev: 0,
        atime_ns: 1,
        mtime_ns: 2,
        ctime_ns: 3,
    }
}

fn location() -> Location {
    Location { host: HostId([3; 16]), host_name: "host3".into(), rack: "r1".into(), ..Location::default() }
}

fn replicas() -> Vec<Replica> {
    let replica = |cs, role| Replica { cs: CsId(cs), role, since: ChunkVersion(1) };
    vec![
        replica(1025, ReplicaRole::Current),
        replica(1026, ReplicaRole::Current),
        replica(1027, ReplicaRole::Rebuilding),
    ]
}

/// A map entry.
pub fn chunk(index: u64) -> ChunkEntry {
    let (chunk, layer, version) = (ChunkId(900 + index), LayerId(1), ChunkVersion(2));
    ChunkEntry { index, chunk, layer, version, minimum: 2, replicas: replicas() }
}

/// A lease of the volume 77.
pub fn grant(clean: bool) -> LeaseGrant {
    LeaseGrant {
        volume: VolumeId(77),
        epoch: Epoch(3),
        mode: LeaseMode::Exclusive,
        size: 8 << 20,
        chunk_size: 1 << 20,
        redundancy: Redundancy::default(),
        clean,
        servers: vec![CsId(1025), CsId(1026)],
    }
}

fn mds_info(id: u64) -> MdsInfo {
    MdsInfo { mds: MdsId(id), addr: addr(7000 + id as u16), voter: true, repository: "/m".into() }
}

/// A chunk server as the cluster knows it.
pub fn cs_info(id: u32) -> CsInfo {
    CsInfo {
        cs: CsId(id),
        addr: addr(6000 + (id - 1024) as u16),
        location: location(),
        tier: 0,
        state: CsState::Active,
        stats: CsStats { capacity: 1 << 40, used: 1 << 30, chunks: 5, ..CsStats::default() },
        repository: "/c".into(),
    }
}

fn volume_info() -> VolumeInfo {
    VolumeInfo {
        volume: VolumeId(77),
        name: "vm1".into(),
        size: 8 << 20,
        chunk_size: 1 << 20,
        redundancy: Redundancy::default(),
        failure_domain: FailureDomain::Host,
        tier: 0,
        chunks: 3,
        holder: Some((ClientId(5), Epoch(3))),
        created_ns: 4,
    }
}

/// The content of every call there is. Inodes, chunks and servers are those of the world of the target `meta_command`.
pub fn requests() -> Named<MdsRequest> {
    use MdsRequest::*;
    let (root, file, name) = (InodeId::ROOT, InodeId(3), b"a file".to_vec());
    let (volume, epoch, cs) = (VolumeId(2), Epoch(1), CsId(1025));
    let purpose = "test".to_owned();
    let order = OrderDone {
        chunk: ChunkId(1),
        version: ChunkVersion(1),
        kind: OrderKind::Rebuild,
        error: Some("no source".into()),
    };
    let create = |name: &[u8], kind, lease| Create {
        parent: root,
        name: name.to_vec(),
        kind,
        mode: 0o755,
        uid: 1,
        gid: 2,
        rdev: 3,
        lease,
    };
    vec![
        (
            "session_open",
            SessionOpen {
                kind: SessionKind::Client,
                host: HostId([1; 16]),
                host_name: "host1".into(),
                purpose,
                nonce: 77,
            },
        ),
        ("session_renew", SessionRenew),
        ("session_close", SessionClose),
        ("session_revoke", SessionRevoke { client: ClientId(1) }),
        ("resolve", Resolve { path: b"/dir/../a file".to_vec() }),
        ("lookup", Lookup { parent: root, name: name.clone() }),
        ("get_attr", GetAttr { inode: file }),
        (
            "set_attr",
            SetAttr {
                inode: file,
                set: cairn_wire::mds::SetAttr {
                    mode: Some(0o600),
                    size: Some(1 << 21),
                    grow_to: Some(5),
                    allocated: Some(4096),
                    mtime_ns: Some(9),
                    ..Default::default()
                },
            },
        ),
        ("create", create(b"file 2", InodeKind::File, true)),
        ("create_directory", create(b"dir 2", InodeKind::Directory, false)),
        ("symlink", Symlink { parent: root, name: b"link".to_vec(), target: b"a file".to_vec(), uid: 1, gid: 2 }),
        ("readlink", Readlink { inode: file }),
        ("link", Link { inode: file, parent: root, name: b"second".to_vec() }),
        ("unlink", Unlink { parent: root, name: name.clone() }),
        ("rmdir", Rmdir { parent: root, name: b"dir".to_vec() }),
        (
            "rename",
            Rename {
                parent: root,
                name: name.clone(),
                new_parent: root,
                new_name: b"dir".to_vec(),
                mode: RenameMode::Exchange,
            },
        ),
        ("read_dir", ReadDir { inode: root, cookie: 0, limit: 100, attributes: true }),
        ("parent", Parent { inode: file }),
        ("get_xattr", GetXattr { inode: file, name: b"user.a".to_vec() }),
        (
            "set_xattr",
            SetXattr { inode: file, name: b"user.a".to_vec(), value: b"value".to_vec(), exists: Some(false) },
        ),
        ("list_xattr", ListXattr { inode: file }),
        ("remove_xattr", RemoveXattr { inode: file, name: b"user.a".to_vec() }),
        ("open_handle", OpenHandle { inode: file }),
        ("close_handle", CloseHandle { inode: file }),
        ("stat_fs", StatFs),
        ("attributes_get", AttributesGet { inode: file }),
        (
            "attributes_set",
            AttributesSet {
                inode: root,
                pairs: vec![("replicas".into(), "2:1".into()), ("failure-domain".into(), "rack".into())],
            },
        ),
        (
            "attributes_set_more",
            AttributesSet { inode: file, pairs: vec![("tier".into(), "1".into()), ("chunk-size".into(), "4M".into())] },
        ),
        (
            "volume_create",
            VolumeCreate {
                name: "vm2".into(),
                size: 1 << 30,
                options: VolumeOptions {
                    redundancy: Some(Redundancy::default()),
                    failure_domain: Some(FailureDomain::Disk),
                    tier: Some(1),
                    chunk_size: Some(1 << 20),
                },
            },
        ),
        ("volume_get", VolumeGet { name: "vm1".into() }),
        ("volume_list", VolumeList { after: String::new(), limit: 10 }),
        ("volume_resize", VolumeResize { volume, size: 1 << 25, shrink: true }),
        ("volume_delete", VolumeDelete { volume }),
        ("volume_rename", VolumeRename { volume, name: "vm3".into() }),
        ("lease_acquire", LeaseAcquire { volume, mode: LeaseMode::Exclusive }),
        ("lease_release", LeaseRelease { leases: vec![(volume, epoch, true), (VolumeId(3), epoch, false)] }),
        ("chunk_map", ChunkMap { volume, index: 0, limit: 64 }),
        ("chunk_allocate", ChunkAllocate { volume, epoch, indexes: vec![0, 1, 5] }),
        ("replica_failed", ReplicaFailed { volume, epoch, cs, chunks: vec![ChunkId(1), ChunkId(2)] }),
        ("chunk_drop", ChunkDrop { volume, epoch, index: 1, count: 3 }),
        (
            "cs_register",
            CsRegister(CsProfile {
                cs: None,
                store: [9; 16],
                addr: addr(6009),
                location: location(),
                tier: 0,
                capacity: 1 << 40,
                repository: "/c9".into(),
            }),
        ),
        (
            "cs_heartbeat",
            CsHeartbeat {
                cs,
                boot: 1,
                stats: CsStats { capacity: 1 << 40, used: 1 << 20, ..CsStats::default() },
                done: vec![order],
                damaged: vec![(ChunkId(1), 5)],
                failed: Some("medium error".into()),
            },
        ),
        (
            "cs_report",
            CsReport {
                cs,
                after: ChunkId(0),
                chunks: vec![
                    ChunkReport { chunk: ChunkId(1), version: ChunkVersion(1) },
                    ChunkReport { chunk: ChunkId(99), version: ChunkVersion(1) },
                ],
                last: true,
            },
        ),
        ("cs_remove", CsRemove { cs, force: true, cancel: false }),
        ("cs_replace", CsReplace { cs, store: [8; 16] }),
        ("topology", Topology),
        ("stat", Stat),
        ("events", Events { after: 0, limit: 100 }),
        ("config_list", ConfigList),
        ("config_set", ConfigSet { pairs: vec![("mds.wd.offline_tout".into(), "300".into())] }),
        ("mds_add", MdsAdd { addr: addr(7002), repository: "/m2".into(), nonce: 5 }),
        ("mds_remove", MdsRemove { mds: MdsId(2) }),
        ("mds_status", MdsStatus),
        ("mds_report", MdsReport { mds: MdsId(2), short: true, free: 1 << 20, state_wanted: 9 }),
        ("levels", Levels),
        ("level_raise", LevelRaise { level: Level::CURRENT }),
        ("cs_busy", CsBusy { cs, busy: 300 }),
        ("kv_get", KvGet { key: b"key".to_vec() }),
        ("kv_put", KvPut { key: b"key".to_vec(), value: b"value".to_vec(), expected: Some(1) }),
        ("kv_delete", KvDelete { key: b"key".to_vec(), expected: None }),
        ("kv_list", KvList { prefix: b"k".to_vec(), after: Vec::new(), limit: 10 }),
        ("replica_full", ReplicaFull { volume, epoch, cs, chunk: ChunkId(1) }),
    ]
}

/// Every call in its envelope, of session 1.
pub fn calls() -> Named<Call> {
    let envelope = |request| Call { session: ClientId(1), sequence: 100, acknowledged: 99, wall_ns: 5, request };
    requests().into_iter().map(|(name, request)| (name, envelope(request))).collect()
}

/// Every answer of the metadata servers.
pub fn replies() -> Named<Result<MdsReply, MdsError>> {
    use MdsReply::*;
    let volume = VolumeId(77);
    let entry = DirEntry {
        name: b"file".to_vec(),
        inode: InodeId(3),
        kind: InodeKind::File,
        cookie: 9,
        attr: Some(attr(3, InodeKind::File)),
    };
    let bare = DirEntry { attr: None, ..entry.clone() };
    let rebuild = CsOrder::Rebuild {
        entry: chunk(1),
        volume,
        block_count: 256,
        sources: vec![(CsId(1026), addr(6002))],
        created: true,
    };
    let delete = CsOrder::Delete { chunk: ChunkId(901), version: ChunkVersion(1) };
    let raise = CsOrder::Raise { chunk: ChunkId(900), since: ChunkVersion(1), version: ChunkVersion(3) };
    let stat = ClusterStat {
        name: "stor1".into(),
        cluster: CLUSTER,
        health: ClusterHealth::Healthy,
        capacity: 1 << 42,
        used: 1 << 30,
        inodes: 9,
        volumes: 1,
        chunks: ChunkCounts { total: 5, healthy: 4, degraded: 1, ..ChunkCounts::default() },
        mds: vec![mds_info(1)],
        leader: Some(MdsId(1)),
        mds_silent: vec![MdsId(2)],
        cs: vec![cs_info(1025)],
        clients: vec![SessionInfo { client: ClientId(5), host_name: "h".into(), purpose: "mount".into(), leases: 1 }],
        mds_ill: vec![(MdsId(2), MdsCondition { no_room: true, lag: MdsLag::Behind })],
    };
    let event = ClusterEvent {
        number: 1,
        wall_ns: 2,
        severity: Severity::Warning,
        code: "MDS-1001".into(),
        text: "a server is silent".into(),
    };
    let fine = vec![
        ("done", Done),
        ("session", Session { client: ClientId(5), term_ms: 10_000, cluster: CLUSTER }),
        ("attr", Attr(attr(3, InodeKind::File))),
        ("created", Created { attr: attr(4, InodeKind::File), lease: Some(grant(true)) }),
        ("entries", Entries { entries: vec![entry, bare], end: true }),
        ("bytes", Bytes(b"target".to_vec())),
        ("stat_fs", StatFs { capacity: 1 << 42, free: 1 << 41, inodes: 5 }),
        ("pairs", Pairs(vec![("replicas".into(), "3:2".into())])),
        ("volume", Volume(volume_info())),
        ("volumes", Volumes { volumes: vec![volume_info(), volume_info()], end: true }),
        ("lease", Lease(grant(false))),
        ("chunks", Chunks((0..8).map(chunk).collect())),
        ("cs_replaced", CsReplaced { left: 3 }),
        (
            "levels",
            Levels {
                cluster: Level::OLDEST,
                leader: Level::CURRENT,
                members: vec![MemberLevel { node: NodeId::Mds(MdsId(2)), what: "host2".into(), level: None }],
            },
        ),
        ("cs_registered", CsRegistered { cs: CsId(1025), cluster: CLUSTER }),
        (
            "orders",
            Orders(vec![
                rebuild,
                raise,
                delete,
                CsOrder::VerifyRate { chunks_per_minute: 60 },
                CsOrder::Level(Level::CURRENT),
            ]),
        ),
        ("topology", Topology { revision: 3, mds: vec![mds_info(1)], cs: (1025..1028).map(cs_info).collect() }),
        ("stat", Stat(Box::new(stat))),
        ("events", Events(vec![event])),
        (
            "mds_admitted",
            MdsAdmitted { mds: MdsId(2), cluster: CLUSTER, name: "stor1".into(), servers: vec![mds_info(1)] },
        ),
        ("mds_status", MdsStatus { mds: MdsId(1), term: 2, leader: Some(MdsId(1)), last: 9, committed: 9, applied: 9 }),
        ("kv", Kv { value: Some((b"value".to_vec(), 3)) }),
        ("kv_list", KvList { entries: vec![(b"k".to_vec(), b"v".to_vec(), 1)], end: true }),
        (
            "created_in",
            CreatedIn { attr: attr(4, InodeKind::File), lease: None, parent: attr(1, InodeKind::Directory) },
        ),
    ];
    let refused = vec![
        ("not_leader", MdsError::NotLeader { leader: Some(addr(7001)) }),
        ("unavailable", MdsError::Unavailable("starting".into())),
        ("unknown", MdsError::Unknown),
        ("session_ended", MdsError::SessionEnded(ClientId(5))),
        ("posix", MdsError::Posix(2)),
        ("held", MdsError::Held { volume, holder: ClientId(6), alive: true }),
        ("stale_epoch", MdsError::StaleEpoch { volume, current: Epoch(9) }),
        ("no_space", MdsError::NoSpace("full".into())),
        ("not_found", MdsError::NotFound("vm1".into())),
        ("exists", MdsError::Exists("vm1".into())),
        ("refused", MdsError::Refused("no".into())),
        ("invalid", MdsError::Invalid("what".into())),
    ];
    let fine = fine.into_iter().map(|(name, reply)| (name, Ok(reply)));
    fine.chain(refused.into_iter().map(|(name, error)| (name, Err(error)))).collect()
}

/// Every push.
pub fn pushes() -> Named<Push> {
    let volume = VolumeId(77);
    vec![
        ("lease_recall", Push::LeaseRecall { volume, wanted: LeaseMode::Exclusive }),
        ("map_changed", Push::MapChanged { volume }),
        ("resized", Push::Resized { volume, size: 1 << 22 }),
        ("topology_changed", Push::TopologyChanged),
        ("orders_waiting", Push::OrdersWaiting),
    ]
}

/// Pieces of a state image.
pub fn image_pieces() -> Named<ImagePiece> {
    let (voters, learners): (Vec<(u64, u64)>, Vec<u64>) = (vec![(1, 101), (2, 102)], vec![]);
    let first = ImagePiece {
        index: 5000,
        term: 2,
        piece: 0,
        conf_state: cairn_wire::encode(&(voters, learners)),
        pairs: vec![(b"key 1".to_vec(), b"value 1".to_vec()), (vec![1; 9], vec![2; 200])],
        last: false,
    };
    let last = ImagePiece { piece: 1, conf_state: Vec::new(), pairs: Vec::new(), last: true, ..first.clone() };
    vec![("first", first), ("last", last)]
}

/// Every rare call to a chunk server, about the world of the target `cs_core`.
pub fn cs_calls() -> Named<CsRequest> {
    let (volume, chunk, epoch, version) = (VolumeId(77), ChunkId(900), Epoch(3), ChunkVersion(2));
    vec![
        ("hello", CsRequest::Hello { session: 9, generation: 1 }),
        ("fence", CsRequest::Fence { volume, epoch }),
        ("tail", CsRequest::Tail { volume, epoch, skip: 0 }),
        ("create", CsRequest::Create { chunk, volume, layer: LayerId(1), index: 0, block_count: 256, version, epoch }),
        ("raise", CsRequest::Raise { chunk, volume, epoch, since: version, version: ChunkVersion(4) }),
        ("extents", CsRequest::Extents { chunk, volume, epoch, version, first_block: 0, block_count: 256 }),
        ("settle", CsRequest::Settle { volume, epoch, settled: Sequence(5) }),
        ("changed", CsRequest::Changed { chunk, version, after: Some(ChunkVersion(1)), from_block: 0 }),
    ]
}

/// Every answer to them.
pub fn cs_replies() -> Named<Result<CsReply, CsError>> {
    let (volume, chunk, epoch) = (VolumeId(77), ChunkId(900), Epoch(3));
    let entry = TailEntry { chunk, first_block: 3, block_count: 2, epoch, sequence: Sequence(4), unmap: false };
    let range = BlockRange { first_block: 0, block_count: 16, mapped: true, tail: Some((epoch, Sequence(4))) };
    vec![
        ("done", Ok(CsReply::Done)),
        ("hello", Ok(CsReply::Hello { boot: 5 })),
        ("fenced", Ok(CsReply::Fenced { boot: 5, tail: 1, previous: Epoch(2) })),
        ("tail", Ok(CsReply::Tail { entries: vec![entry, TailEntry { unmap: true, ..entry }], end: true })),
        (
            "ranges",
            Ok(CsReply::Ranges { ranges: vec![range, BlockRange { first_block: 16, ..range }], next: Some(32) }),
        ),
        ("stale_epoch", Err(CsError::StaleEpoch { volume, current: Epoch(9) })),
        ("version", Err(CsError::VersionMismatch { chunk, current: ChunkVersion(9) })),
        ("no_chunk", Err(CsError::NoSuchChunk(chunk))),
        ("not_fenced", Err(CsError::NotFenced(volume))),
        ("superseded", Err(CsError::Superseded)),
        ("disk", Err(CsError::DiskFailed("gone".into()))),
        ("full", Err(CsError::NoSpace)),
        ("invalid", Err(CsError::Invalid("what".into()))),
    ]
}

/// Every request of the data path, about the world of the target `cs_core`; blocks written are zeros.
pub fn data_requests() -> Named<DataRequest> {
    let zeros = crc64(&[0; BLOCK_SIZE]);
    let read = DataRequest {
        op: DataOp::Read,
        flags: 0,
        volume: VolumeId(77),
        chunk: ChunkId(900),
        version: ChunkVersion(2),
        epoch: Epoch(3),
        sequence: Sequence(0),
        settled: Sequence(0),
        first_block: 4,
        block_count: 2,
        checksums: Vec::new(),
    };
    let write = DataRequest {
        op: DataOp::Write,
        flags: FLAG_DURABLE,
        sequence: Sequence(1),
        checksums: vec![zeros; 2],
        ..read.clone()
    };
    let unmap = DataRequest { op: DataOp::Unmap, sequence: Sequence(2), block_count: 100, ..read.clone() };
    let flush = DataRequest { op: DataOp::Flush, chunk: ChunkId(0), first_block: 0, block_count: 0, ..read.clone() };
    let confirm = DataRequest { op: DataOp::Confirm, ..flush.clone() };
    vec![("read", read), ("write", write), ("unmap", unmap), ("flush", flush), ("confirm", confirm)]
}

/// Answers of the data path.
pub fn data_replies() -> Named<DataReply> {
    let durable = Sequence(4);
    let zeros = crc64(&[0; BLOCK_SIZE]);
    vec![
        ("reply_ok", DataReply { durable, epoch: Epoch(3), ..DataReply::of(DataStatus::Ok) }),
        ("reply_data", DataReply { checksums: vec![zeros; 2], block_count: 2, ..DataReply::of(DataStatus::Ok) }),
        ("reply_holes", DataReply { flags: FLAG_ZERO, block_count: 2, ..DataReply::of(DataStatus::Ok) }),
        ("reply_corrupt", DataReply { detail: 4, ..DataReply::of(DataStatus::Corrupt) }),
    ]
}

/// A write as it goes into a frame: prefix and payload.
pub fn write_request() -> (Vec<u8>, Vec<u8>) {
    let (_, write) = data_requests().swap_remove(1);
    let mut prefix = Vec::new();
    write.encode(&mut prefix);
    (prefix, vec![0; write.checksums.len() * BLOCK_SIZE])
}
