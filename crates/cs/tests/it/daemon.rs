//! The daemon on real sockets and a real file: made, registered, written, stopped, started again.

use crate::world::{VOLUME, op, write};
use cairn_cs::{CsRunConfig, CsRunError, MakeCs, RepositoryError, make_cs, read_identity, start};
use cairn_env::Buf;
use cairn_env_real::{Identity, Reactor, ReactorConfig, ReactorOptions, block_on_local};
use cairn_types::*;
use cairn_wire::auth::ClusterKey;
use cairn_wire::cs::{CsReply, CsRequest};
use cairn_wire::data::{DataOp, DataReply, DataRequest, DataStatus};
use cairn_wire::mds::{Call, MdsError, MdsInfo, MdsReply, MdsRequest};
use cairn_wire::{Effects, Event, Frame, FrameKind, LinkId, NetEffect, NetEvent, Now, Process};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

const CLUSTER: ClusterId = ClusterId([5; 16]);
const LINK: LinkId = LinkId(1);

/// Plays the metadata server on links it accepted, and the client on the one it opened.
#[derive(Default)]
struct Other {
    up: bool,
    frames: BTreeMap<u64, Frame>,
    heartbeats: u64,
    /// Where it says that metadata servers are.
    group: Vec<SocketAddr>,
}

impl Process for Other {
    fn step(&mut self, _now: Now, event: Event, out: &mut Effects) {
        match event {
            Event::Net(NetEvent::Up { link: LINK, .. }) => self.up = true,
            Event::Net(NetEvent::Frame { link: LINK, frame }) => {
                self.frames.insert(frame.id, frame);
            }
            Event::Net(NetEvent::Frame { link, frame }) => {
                let call: Call = cairn_wire::decode("call", &frame.prefix).unwrap();
                let reply: Result<MdsReply, MdsError> = match call.request {
                    MdsRequest::CsJoin { .. } => Ok(MdsReply::CsRegistered { cs: CsId(1030), cluster: CLUSTER }),
                    MdsRequest::CsHeartbeat { cs, .. } => {
                        assert_eq!(cs, CsId(1030));
                        self.heartbeats += 1;
                        Ok(MdsReply::Orders(Vec::new()))
                    }
                    MdsRequest::CsMark { .. } => Ok(MdsReply::Done),
                    MdsRequest::Topology => {
                        let mds = |addr: &SocketAddr| MdsInfo {
                            mds: MdsId(1),
                            addr: *addr,
                            voter: true,
                            repository: String::new(),
                        };
                        let mds = self.group.iter().map(mds).collect();
                        Ok(MdsReply::Topology { revision: 1, mds, cs: Vec::new() })
                    }
                    _ => Ok(MdsReply::Orders(Vec::new())),
                };
                out.send(link, FrameKind::MdsReply, frame.id, cairn_wire::encode(&reply));
            }
            _ => {}
        }
    }
}

fn key() -> ClusterKey {
    ClusterKey::from_hex(&"5a".repeat(32)).unwrap()
}

fn other(listener: TcpListener, group: &[SocketAddr]) -> Reactor<Other> {
    let node = NodeId::Mds(MdsId(1));
    let identity = Identity { key: key(), cluster_name: "stor1".into(), cluster: Some(CLUSTER), node };
    let config =
        ReactorConfig { identity, listen: vec![listener], disks: Vec::new(), options: ReactorOptions::default() };
    Reactor::start(config, Other { group: group.to_vec(), ..Other::default() }).unwrap()
}

/// Waits for something by asking after every turn of the runtime; time only bounds a failure.
async fn wait<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(value) = ready() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it happens within the deadline")
}

async fn ask(other: &Reactor<Other>, id: u64, kind: FrameKind, prefix: Vec<u8>, payload: Buf) -> Frame {
    other.with(|_, _, out| out.net.push(NetEffect::Send { link: LINK, kind, id, prefix, payload: vec![payload] }));
    wait(|| other.with(|other, _, _| other.frames.remove(&id))).await
}

async fn call(other: &Reactor<Other>, id: u64, request: CsRequest) -> CsReply {
    let frame = ask(other, id, FrameKind::CsCall, cairn_wire::encode(&request), Buf::default()).await;
    let reply: Result<CsReply, cairn_wire::cs::CsError> = cairn_wire::decode("reply", &frame.prefix).unwrap();
    reply.unwrap()
}

async fn data(other: &Reactor<Other>, id: u64, request: &DataRequest, payload: Buf) -> (DataReply, Buf) {
    let mut prefix = Vec::new();
    request.encode(&mut prefix);
    let frame = ask(other, id, FrameKind::Data, prefix, payload).await;
    (DataReply::decode(&frame.prefix, frame.payload.len()).unwrap(), frame.payload)
}

/// Metadata servers that say that they are those of `group`; the chunk server is told of `mds`.
async fn session(dir: &Path, generation: u64, listener: TcpListener, group: &[SocketAddr], mds: SocketAddr) -> u8 {
    let other = other(listener, group);
    let config = CsRunConfig {
        listen: Some("127.0.0.1:0".parse().unwrap()),
        ..CsRunConfig::new(dir.to_owned(), "stor1".into(), key(), vec![mds])
    };
    let running = start(&config).await.unwrap();
    let again = start(&config).await;
    assert!(matches!(again, Err(CsRunError::Repository(RepositoryError::InUse { .. }))));
    wait(|| other.with(|other, _, _| (other.heartbeats > 0).then_some(()))).await;
    other.with(|_, _, out| out.net.push(NetEffect::Connect { link: LINK, addr: running.addr }));
    wait(|| other.with(|other, _, _| other.up.then_some(()))).await;
    call(&other, 1, CsRequest::Hello { session: 1, generation }).await;
    call(&other, 2, CsRequest::Fence { volume: VOLUME, epoch: Epoch(generation) }).await;
    if generation == 1 {
        let (chunk, layer) = (crate::world::CHUNK, LayerId(1));
        let (version, epoch) = (ChunkVersion(1), Epoch(1));
        let create = CsRequest::Create { chunk, volume: VOLUME, layer, index: 0, block_count: 64, version, epoch };
        call(&other, 3, create).await;
        let (request, payload) = write(1, 1, 1, 7, 2, 0x77);
        assert_eq!(data(&other, 4, &request, payload).await.0.status, DataStatus::Ok);
    }
    let (reply, payload) = data(&other, 5, &op(DataOp::Read, 1, generation, 0, 8), Buf::default()).await;
    assert_eq!(reply.status, DataStatus::Ok);
    wait(|| running.reactor.peek(|core| (core.mds_servers() == group).then_some(()))).await;
    running.stop().await;
    other.stop();
    payload[0]
}

#[test]
fn it_is_made_run_stopped_and_run_again() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("cs1");
    let make = MakeCs {
        replaces: None,
        dir: dir.clone(),
        cluster: CLUSTER,
        cluster_name: "stor1".into(),
        host: HostId([1; 16]),
        tier: 0,
        size: Some(64 << 20),
        device: None,
        fill: false,
    };
    make_cs(&make, |_| {}).unwrap();
    let listeners = [0, 0].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second] = [0, 1].map(|at: usize| listeners[at].local_addr().unwrap());
    let [listener, later] = listeners;
    // The first metadata server says that the group will be elsewhere, and that is where it is found.
    assert_eq!(block_on_local(session(&dir, 1, listener, &[second], first)).unwrap(), 0x77);
    assert_eq!(read_identity(&dir).unwrap().cs, Some(CsId(1030)), "the id was written down");
    assert_eq!(block_on_local(session(&dir, 2, later, &[second], first)).unwrap(), 0x77);
}

#[test]
fn an_address_in_use_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let make = MakeCs {
        replaces: None,
        dir: scratch.path().to_owned(),
        cluster: CLUSTER,
        cluster_name: "stor1".into(),
        host: HostId([1; 16]),
        tier: 0,
        size: Some(32 << 20),
        device: None,
        fill: false,
    };
    make_cs(&make, |_| {}).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = CsRunConfig {
        listen: Some(taken.local_addr().unwrap()),
        ..CsRunConfig::new(make.dir.clone(), "stor1".into(), key(), vec!["127.0.0.1:9".parse().unwrap()])
    };
    let result = block_on_local(async { start(&config).await.err() }).unwrap();
    assert!(result.is_some_and(|error| error.to_string().contains("another process uses this address")));
}
