//! A rolling upgrade of real processes, by hand, while a volume is written and read; the end of it, and what is refused
//! afterwards. A process of the release before is the same executable told to behave as one.

use crate::by_hand::{LIMIT, Node, active, add_cs, first_mds, free_addrs, voters};
use cairn_tests::cluster::scratch;
use cairn_tests::nbd::NbdClient;
use cairn_tests::process::{pause, poll};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const BLOCK: usize = 4096;
/// Blocks written in turn, far enough apart to be in several chunks.
const BLOCKS: u64 = 32;
const STRIDE: u64 = 1 << 20;
const OLD: Option<u32> = Some(1);

/// Writes and reads back for as long as it lives; a connection that ends is made again, what was under way then may
/// have happened or not.
struct Load {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(BLOCK / 8)
}

fn load(port: u16, stop: &AtomicBool, writes: &AtomicU64) {
    let mut values: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut client: Option<NbdClient> = None;
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(nbd) = &mut client else {
            client = NbdClient::connect(port, "vol").ok();
            pause();
            continue;
        };
        next += 1;
        let block = next * 7 % BLOCKS;
        let may_be = values.entry(block).or_insert_with(|| vec![0]);
        let mut held = vec![0; BLOCK];
        if nbd.read_at(&mut held, block * STRIDE).is_err() {
            client = None;
            continue;
        }
        assert!(may_be.iter().any(|value| stamp(*value) == held), "block {block} holds something else than {may_be:?}");
        let value = u64::from_le_bytes(held[..8].try_into().expect("eight bytes"));
        match nbd.write_durable_at(&stamp(next), block * STRIDE) {
            Ok(()) => {
                *may_be = vec![next];
                writes.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                *may_be = vec![value, next];
                client = None;
            }
        }
    }
}

impl Load {
    #[expect(clippy::disallowed_methods, reason = "a client at work while servers are restarted")]
    fn start(port: u16) -> Self {
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stops, counts) = (Arc::clone(&stop), Arc::clone(&writes));
        let thread = std::thread::spawn(move || load(port, &stops, &counts));
        Self { stop, writes, thread: Some(thread) }
    }

    /// Waits until some more writes were acknowledged.
    fn goes_on(&self) {
        let before = self.writes.load(Ordering::Relaxed);
        poll("writes go on", LIMIT, || {
            assert!(!self.thread.as_ref().is_some_and(JoinHandle::is_finished), "the load found something wrong");
            (self.writes.load(Ordering::Relaxed) >= before + 20).then_some(())
        });
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("the load found nothing wrong");
        self.writes.load(Ordering::Relaxed)
    }
}

fn restart(node: &mut Node, name: &str, words: &[&str], level: Option<u32>) {
    node.stop(name);
    node.level = level;
    node.start(name, words);
    node.level = None;
}

/// Restarts a server with a release and waits until everybody is there.
fn roll(node: &mut Node, name: &str, level: Option<u32>, load: &Load) {
    let role = name.trim_end_matches(char::is_numeric).to_owned();
    restart(node, name, &[&role, "run", "-r", name], level);
    node.wait_for(&format!("{name} is back"), |stat| {
        let silent = stat["mds"].as_array().is_some_and(|all| all.iter().any(|mds| mds["state"] == "silent"));
        voters(stat) == 3 && active(stat) == 3 && !silent
    });
    load.goes_on();
}

fn levels(node: &Node) -> (u64, Vec<Option<u64>>) {
    let all = node.json(&["upgrade"]);
    let members = all["members"].as_array().expect("a list");
    let servers = members.iter().filter(|member| member["type"] != "CLIENT");
    (all["level"].as_u64().expect("a number"), servers.map(|member| member["level"].as_u64()).collect())
}

/// A new leader knows the release of a server once it has heard from it.
fn wait_for_levels(node: &Node, expected: &(u64, Vec<Option<u64>>)) {
    poll(&format!("the levels are {expected:?}"), LIMIT, || (levels(node) == *expected).then_some(()));
}

#[test]
fn a_cluster_is_upgraded_server_by_server_under_load_and_back_until_it_is_finalized() {
    let scratch = scratch();
    let addrs = free_addrs(7);
    let mut node = Node::new(scratch.path(), "etc");
    node.level = OLD;
    first_mds(&mut node, &addrs[0]);
    for number in 2..=3 {
        let repository = format!("mds{number}");
        node.done(&["make-mds", "-a", &addrs[number - 1], "-r", &repository]);
        node.run("mds", &repository);
        node.wait_for("a metadata server votes", |stat| voters(stat) == number);
    }
    for number in 1..=3 {
        add_cs(&mut node, number, &addrs[2 + number]);
    }
    node.wait_for("three chunk servers are active", |stat| active(stat) == 3);
    node.done(&["volume", "create", "vol", "1G", "--replicas", "3:2", "--chunk-size", "4M"]);
    let serve = ["nbd", "serve", "vol", "--listen", &addrs[6]];
    node.start("nbd", &serve);
    node.level = None;
    let port = addrs[6].rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let load = Load::start(port);
    load.goes_on();
    let at = |level: u64| vec![Some(level); 5];
    wait_for_levels(&node, &(1, at(1)));
    node.cairn(&["upgrade", "--finalize"]).must_fail("nothing new runs", 1, "nothing to finalize");

    // In no good order, and some of them back.
    for (name, level) in [
        ("cs1", None),
        ("mds2", None),
        ("mds1", None),
        ("cs2", None),
        ("mds2", OLD),
        ("cs1", OLD),
        ("mds3", None),
        ("cs3", None),
    ] {
        roll(&mut node, name, level, &load);
    }
    let text = poll("a leader refuses", LIMIT, || {
        let outcome = node.cairn(&["upgrade", "--finalize"]);
        assert_ne!(outcome.code, 0, "not everybody is there yet: {}", outcome.text());
        Some(outcome.stderr)
    });
    assert!(["is of level 1", "nothing to finalize"].iter().any(|part| text.contains(part)), "{text}");
    for name in ["mds2", "cs1"] {
        roll(&mut node, name, None, &load);
    }
    wait_for_levels(&node, &(1, at(2)));
    node.cairn(&["upgrade", "--finalize"]).must_fail("the export is old", 1, "nbd");
    restart(&mut node, "nbd", &serve, None);
    load.goes_on();
    // Sessions that just ended are counted for some seconds.
    poll("the upgrade is finalized", LIMIT, || (node.cairn(&["upgrade", "--finalize"]).code == 0).then_some(()));
    wait_for_levels(&node, &(2, at(2)));
    load.goes_on();
    assert!(node.done(&["get-event"]).contains("the cluster is at level 2 from now on"));

    refuses_the_release_before(&mut node, &load);
    let writes = load.end();
    eprintln!("{writes} writes were acknowledged meanwhile, and every block held what was written last");
}

fn refuses_the_release_before(node: &mut Node, load: &Load) {
    for (name, part) in [("mds3", "there is no way back"), ("cs2", "start it with the newer release")] {
        let role = name.trim_end_matches(char::is_numeric);
        restart(node, name, &[role, "run", "-r", name], OLD);
        let said = node.gives_up(name);
        assert!(said.contains(part), "{name}: {said}");
        node.run(role, name);
        node.wait_for("it goes on with the newer release", |stat: &Value| voters(stat) == 3 && active(stat) == 3);
        load.goes_on();
    }
    node.level = OLD;
    node.cairn(&["stat"]).must_fail("a client of the release before", 3, "the cluster was raised to level 2");
    node.level = None;
}
