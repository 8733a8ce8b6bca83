//! Mounts of a real cluster: a metadata server and three chunk servers in this process, over sockets and files.

use crate::{TestMount, fsx, mounts};
use cairn_client::{Client, ClientConfig, OnNoSpace};
use cairn_cs::repository::{MakeCs, make_cs};
use cairn_cs::shell::CsRunConfig;
use cairn_fuse::ClientRunner;
use cairn_mds::repository::{Identity, create};
use cairn_mds::shell::RunConfig;
use cairn_types::{ClusterId, HostId, MdsId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::{MdsReply, MdsRequest, SessionKind};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, mpsc};
use tempfile::TempDir;

const NAME: &str = "test";
const STORE_SIZE: u64 = 768 << 20;

/// Servers on threads of this process. They end with it: every test has a process of its own under nextest.
struct RealCluster {
    key: ClusterKey,
    mds: SocketAddr,
    _directory: TempDir,
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).expect("a thread");
}

fn start_mds(directory: &Path, cluster: ClusterId, key: ClusterKey) -> SocketAddr {
    let addr = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
    let (id, instance) = (MdsId(1), 77);
    let identity = Identity {
        version: 1,
        cluster: cluster.to_string(),
        cluster_name: NAME.to_owned(),
        id: id.0,
        instance,
        bootstrap: true,
        addr,
        servers: vec![(id.0, addr)],
    };
    fs::create_dir(directory).expect("mkdir");
    let initial = cairn_consensus::Initial::Bootstrap { voters: vec![cairn_consensus::Member { id, instance }] };
    create(directory, &identity, &initial).expect("a repository");
    let (ready, is_ready) = mpsc::channel();
    let dir = directory.to_owned();
    thread("mds", move || {
        let on_ready = Box::new(move |addr| ready.send(addr).expect("somebody waits"));
        if let Err(error) = cairn_mds::shell::run(RunConfig { dir, key, on_ready }) {
            panic!("metadata server: {error}");
        }
    });
    is_ready.recv().expect("the metadata server starts")
}

fn start_cs(directory: &Path, number: u8, cluster: ClusterId, key: ClusterKey, mds: SocketAddr) {
    let make = MakeCs {
        replaces: None,
        dir: directory.to_owned(),
        cluster,
        cluster_name: NAME.to_owned(),
        host: HostId([number; 16]),
        tier: 0,
        size: Some(STORE_SIZE),
        device: None,
        fill: false,
    };
    make_cs(&make, |_| ()).expect("a store");
    let mut config = CsRunConfig::new(directory.to_owned(), NAME.to_owned(), key, vec![mds]);
    config.listen = Some("127.0.0.1:0".parse().expect("an address"));
    config.host_name = format!("host{number}");
    let (ready, is_ready) = mpsc::channel();
    thread("cs", move || {
        let serve = async move {
            let running = cairn_cs::shell::start(&config).await.expect("the chunk server starts");
            ready.send(()).expect("somebody waits");
            running.reactor.stopped().await;
        };
        cairn_env_real::block_on_local(serve).expect("a runtime");
    });
    is_ready.recv().expect("the chunk server starts");
}

impl RealCluster {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let cluster = ClusterId(cairn_env_real::random_bytes());
        let key = ClusterKey::derive(NAME, "a password for tests").expect("a key");
        let mds = start_mds(&directory.path().join("mds"), cluster, key.clone());
        for number in 1..=3 {
            start_cs(&directory.path().join(format!("cs{number}")), number, cluster, key.clone(), mds);
        }
        let cluster = Self { key, mds, _directory: directory };
        cluster.wait_for_servers(3);
        cluster
    }

    /// Waits until so many chunk servers have joined: before, a chunk finds too few hosts.
    fn wait_for_servers(&self, count: usize) {
        let client = Client::spawn(self.client("wait")).expect("the client connects");
        loop {
            let (tell, told) = mpsc::channel();
            client.run(move |local| {
                local.call_with(MdsRequest::Topology, move |reply| {
                    let _ = tell.send(reply);
                });
            });
            match told.recv().expect("an answer") {
                Ok(MdsReply::Topology { cs, .. }) if cs.len() >= count => break,
                Ok(_) => std::thread::yield_now(),
                Err(error) => panic!("topology: {error}"),
            }
        }
        client.shutdown();
    }

    fn client(&self, purpose: &str) -> ClientConfig {
        ClientConfig {
            cluster_name: NAME.to_owned(),
            key: self.key.clone(),
            cluster: None,
            mds: vec![self.mds],
            host: HostId([9; 16]),
            host_name: "host9".to_owned(),
            purpose: purpose.to_owned(),
            kind: SessionKind::Client,
            on_no_space: OnNoSpace::Fail,
            keep_servers: None,
        }
    }

    fn mount(&self, options: &str) -> Option<TestMount> {
        let client = || Client::spawn(self.client("mount")).expect("the client connects");
        TestMount::with(|| Arc::new(ClientRunner(client())), options)
    }
}

#[test]
fn a_real_cluster_behaves_as_posix() {
    let cluster = RealCluster::start();
    if let Some(mount) = cluster.mount("dev,suid") {
        mounts::posix_on(&mount);
    }
}

#[test]
fn a_real_cluster_keeps_what_random_operations_leave() {
    let cluster = RealCluster::start();
    fsx::run_on(31, || cluster.mount(""), 0, 900);
    fsx::run_on(32, || cluster.mount(""), libc::O_DIRECT, 300);
}

#[test]
fn a_real_cluster_verifies_under_fio() {
    let cluster = RealCluster::start();
    if let Some(mount) = cluster.mount("") {
        mounts::fio_on(&mount, "16m");
    }
}

#[test]
fn two_mounts_of_a_real_cluster_see_each_others_closed_files() {
    let cluster = RealCluster::start();
    let (Some(a), Some(b)) = (cluster.mount(""), cluster.mount("")) else { return };
    for round in 0..20_usize {
        let text = format!("round {round} ").repeat(1 + (round * 7919) % 3000);
        let (writer, reader) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        fs::write(writer.path().join("f"), &text).expect("write");
        assert_eq!(fs::read_to_string(reader.path().join("f")).expect("read"), text, "round {round}");
    }
    for number in 0..300 {
        fs::write(a.path().join(format!("n{number}")), format!("content {number}")).expect("write");
    }
    for number in 0..300 {
        let text = fs::read_to_string(b.path().join(format!("n{number}"))).expect("read");
        assert_eq!(text, format!("content {number}"));
    }
}

#[test]
#[ignore = "prints figures; run it alone"]
fn figures_of_a_real_cluster() {
    let cluster = RealCluster::start();
    if let Some(mount) = cluster.mount("threads=2") {
        mounts::figures_on(&mount);
    }
}
