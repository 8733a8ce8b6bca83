//! A cluster set up by hand as the guide says, on one machine; what is refused, with which words and exit code.

use cairn_tests::cluster::scratch;
use cairn_tests::process::{self, Outcome, poll};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub const LIMIT: Duration = Duration::from_secs(60);
const PASSWORD: &str = "correct horse\n";

/// One node: its own `/etc/cairn`, and the servers it runs.
pub struct Node {
    etc: PathBuf,
    root: PathBuf,
    pub running: Vec<(String, Child)>,
    /// What it runs is of this release level; none for the present one.
    pub level: Option<u32>,
}

impl Node {
    pub fn new(root: &Path, name: &str) -> Self {
        Self { etc: root.join(name), root: root.to_path_buf(), running: Vec::new(), level: None }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(process::binary());
        command.args(words).env("CAIRN_CONFIG_DIR", &self.etc).env("CAIRN_CLUSTER", "hand").current_dir(&self.root);
        if let Some(level) = self.level {
            command.env("CAIRN_RELEASE_LEVEL", level.to_string());
        }
        command
    }

    pub fn cairn(&self, words: &[&str]) -> Outcome {
        process::run(&mut self.command(words), LIMIT)
    }

    pub fn with_password(&self, words: &[&str], password: &str) -> Outcome {
        process::run_with_input(&mut self.command(words), password, LIMIT)
    }

    pub fn done(&self, words: &[&str]) -> String {
        self.cairn(words).must_succeed(&words.join(" "))
    }

    pub fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.done(&[words, &["-o", "json"]].concat())).expect("the output is JSON")
    }

    pub fn run(&mut self, role: &str, repository: &str) {
        self.start(repository, &[role, "run", "-r", repository]);
    }

    /// Runs something under a name.
    pub fn start(&mut self, repository: &str, words: &[&str]) {
        let log = File::create(self.root.join(format!("{repository}.log"))).expect("make a log");
        let mut command = self.command(words);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("duplicate")).stderr(log);
        process::die_with_test(&mut command, libc::SIGKILL);
        self.running.push((repository.to_owned(), command.spawn().expect("start a server")));
    }

    pub fn child(&mut self, repository: &str) -> &mut Child {
        &mut self.running.iter_mut().find(|(name, _)| name == repository).expect("it runs").1
    }

    pub fn stat(&self) -> Option<Value> {
        let outcome = self.cairn(&["stat", "-o", "json"]);
        (outcome.code == 0).then(|| serde_json::from_str(&outcome.stdout).expect("the output is JSON"))
    }

    pub fn wait_for(&self, what: &str, mut condition: impl FnMut(&Value) -> bool) {
        poll(what, LIMIT, || self.stat().filter(&mut condition));
    }
}

impl Node {
    /// Stops what runs under a name, in good order.
    pub fn stop(&mut self, name: &str) {
        process::signal(self.child(name).id(), libc::SIGTERM);
        poll(&format!("{name} stops"), LIMIT, || self.child(name).try_wait().expect("wait"));
        self.running.retain(|(other, _)| other != name);
    }

    /// What runs under a name ends by itself; what it said.
    pub fn gives_up(&mut self, name: &str) -> String {
        let status = poll(&format!("{name} gives up"), LIMIT, || self.child(name).try_wait().expect("wait"));
        assert_eq!(status.code(), Some(1), "{name}");
        self.running.retain(|(other, _)| other != name);
        std::fs::read_to_string(self.root.join(format!("{name}.log"))).expect("it has a log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for (name, child) in &mut self.running {
            let _ = child.kill().and_then(|()| child.wait());
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.root.join(format!("{name}.log"))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("--- {name}\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
            }
        }
    }
}

pub fn voters(stat: &Value) -> usize {
    stat["mds"].as_array().map_or(0, |all| all.iter().filter(|mds| mds["voter"] == true).count())
}

pub fn active(stat: &Value) -> usize {
    stat["cs"].as_array().map_or(0, |all| all.iter().filter(|cs| cs["state"] == "active").count())
}

/// Addresses nobody listens on, all different.
pub fn free_addrs(count: usize) -> Vec<String> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("bind")).collect();
    held.iter().map(|listener| listener.local_addr().expect("it is bound").to_string()).collect()
}

/// Makes the first metadata server and runs it.
pub fn first_mds(node: &mut Node, addr: &str) {
    node.with_password(&["make-mds", "-I", "-p", "-a", addr, "-r", "mds1"], PASSWORD).must_succeed("make-mds -I");
    node.run("mds", "mds1");
    node.wait_for("the first metadata server leads", |stat| voters(stat) == 1);
}

pub fn add_cs(node: &mut Node, number: usize, addr: &str) {
    let (dir, host) = (format!("cs{number}"), format!("{number:032x}"));
    node.done(&["make-cs", "-r", &dir, "-a", addr, "--size", "1G", "--host-id", &host]);
    node.run("cs", &dir);
}

#[test]
fn a_cluster_is_set_up_and_used_as_the_guide_says() {
    let scratch = scratch();
    let addrs = free_addrs(6);
    let mut first = Node::new(scratch.path(), "etc1");
    first_mds(&mut first, &addrs[0]);
    let mut second = Node::new(scratch.path(), "etc2");
    let auth = ["auth-node", "-b", &addrs[0]];
    second.with_password(&auth, "wrong password\n").must_fail("a wrong password", 4, "authentication failed");
    assert!(!second.etc.join("clusters").exists(), "nothing is kept of a node that was refused");
    second.with_password(&auth, PASSWORD).must_succeed("auth-node");
    second.done(&["make-mds", "-a", &addrs[1], "-r", "mds2", "-b", &addrs[0]]);
    second.run("mds", "mds2");
    first.wait_for("the second metadata server votes", |stat| voters(stat) == 2);
    let mut third = Node::new(scratch.path(), "etc3");
    let words = ["make-mds", "-a", &addrs[2], "-r", "mds3", "-b", &addrs[0], "-p"];
    third.with_password(&words, PASSWORD).must_succeed("make-mds -p -b");
    third.run("mds", "mds3");
    first.wait_for("the third metadata server votes", |stat| voters(stat) == 3);
    for number in 1..=3 {
        add_cs(&mut first, number, &addrs[2 + number]);
    }
    first.wait_for("three chunk servers are active", |stat| active(stat) == 3);
    let listed = third.done(&["list-services"]);
    assert!(addrs.iter().all(|addr| listed.contains(addr.as_str())), "{listed}");
    let shown = |line: &str| line.split_whitespace().last().is_some_and(|path| path.starts_with('/'));
    assert!(listed.lines().skip(1).all(shown), "repositories are shown with their full path: {listed}");
    volumes(&third);
    attributes(&third);
    refuses_strangers(&third, &addrs, scratch.path());
    removes_a_metadata_server(&mut first, &mut third);
}

fn volumes(node: &Node) {
    node.done(&["volume", "create", "one", "10G"]);
    node.done(&["volume", "create", "two", "1G", "--replicas", "2", "--chunk-size", "4M"]);
    node.cairn(&["volume", "create", "one", "1G"]).must_fail("a name twice", 1, "one");
    node.cairn(&["volume", "create", " ", "1G"]).must_fail("a name of nothing", 2, "no space at either end");
    let list = node.json(&["volume", "list"]);
    assert_eq!(list.as_array().map(Vec::len), Some(2), "{list}");
    let info = node.json(&["volume", "info", "two"]);
    assert_eq!((&info["size"], &info["chunk_size"]), (&Value::from(1u64 << 30), &Value::from(4 << 20)), "{info}");
    assert_eq!(info["replicas"], "2:1", "{info}");
    node.done(&["volume", "resize", "one", "12G"]);
    node.cairn(&["volume", "resize", "one", "11G"]).must_fail("shrinking unasked", 1, "shrinking drops");
    assert_eq!(node.json(&["volume", "info", "one"])["size"], 12u64 << 30);
    node.done(&["volume", "resize", "one", "11G", "--shrink"]);
    node.done(&["volume", "rename", "one", "uno"]);
    assert_eq!(node.json(&["volume", "info", "uno"])["size"], 11u64 << 30);
    node.cairn(&["volume", "info", "one"]).must_fail("the old name", 1, "one");
    node.cairn(&["volume", "delete", "uno"]).must_fail("deleting unasked", 1, "--yes");
    node.done(&["volume", "delete", "uno", "--yes"]);
    node.done(&["volume", "delete", "two", "-y"]);
    assert_eq!(node.json(&["volume", "list"]).as_array().map(Vec::len), Some(0));
}

fn attributes(node: &Node) {
    let shown = node.json(&["get-attr", "-p", "/"]);
    assert_eq!(shown["replicas"], "3:2", "{shown}");
    node.done(&["set-attr", "-p", "/", "replicas=2", "failure-domain=disk", "tier=1"]);
    let shown = node.json(&["get-attr", "-p", "/"]);
    let wanted = [("replicas", "2:1"), ("failure-domain", "disk"), ("tier", "1")];
    assert!(wanted.iter().all(|(name, value)| shown[*name] == *value), "{shown}");
    node.cairn(&["set-attr", "-p", "/", "colour=red"]).must_fail(
        "an unknown attribute",
        2,
        "there is no attribute `colour`",
    );
    node.cairn(&["set-attr", "-p", "/", "replicas=99"]).must_fail("too many copies", 2, "replicas");
    node.cairn(&["set-attr", "-p", "/", "replicas=1", "tier=3", "colour=red"]).must_fail("one of three", 2, "colour");
    assert_eq!(node.json(&["get-attr", "-p", "/"]), shown, "none of several is set when one is wrong");
    let words = ["set-config", "mds.wd.verify_chunks=9", "mds.wd.offline_tout=soon"];
    node.cairn(&words).must_fail("one of two parameters", 2, "mds.wd.offline_tout is a number");
    assert_eq!(node.json(&["get-config"])["mds.wd.verify_chunks"], "2", "none of several is set when one is wrong");
    node.cairn(&["set-config", "nonsense"]).must_fail("no pair", 2, "is not key=value");
    let outcome = node.cairn(&["get-attr", "-p", "/nowhere"]);
    outcome.must_fail("a path that is not there", 1, "look up /nowhere in the cluster: No such file");
    node.done(&["set-attr", "-p", "/", "replicas=3:2", "failure-domain=host", "tier=0"]);
}

/// Whoever has no key or another one gets nothing from any port.
fn refuses_strangers(node: &Node, addrs: &[String], root: &Path) {
    for addr in addrs {
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 65536], &[0; 4096]] {
            let mut stream = TcpStream::connect(addr).expect("the port is open");
            stream.set_read_timeout(Some(LIMIT)).expect("set a limit");
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let outcome = stream.read_to_end(&mut answer);
            let timed_out = outcome.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
            assert!(!timed_out, "{addr} keeps a stranger's link");
            assert!(answer.len() < 4096, "{addr} tells a stranger {} bytes", answer.len());
        }
    }
    // A key of another password for the same name: made with a cluster of its own, pointed at this one.
    let stranger = Node::new(root, "etc-stranger");
    let own = free_addrs(1).remove(0);
    let words = ["make-mds", "-I", "-p", "-a", &own, "-r", "mds-stranger"];
    stranger.with_password(&words, "another password\n").must_succeed("make-mds -I");
    for addr in &addrs[..3] {
        let words = ["--mds-addr", addr, "stat"];
        stranger.cairn(&words).must_fail("a client with another key", 4, "authentication failed");
    }
    assert_eq!(node.stat().map(|stat| voters(&stat)), Some(3), "the cluster took no harm");
}

/// The place of a chunk server is told to the cluster, and copies are kept apart by it.
fn places_are_told(node: &mut Node) {
    let place = |node: &Node| {
        let stat = node.stat()?;
        let server = stat["cs"]
            .as_array()?
            .iter()
            .find(|cs| cs["repository"].as_str().is_some_and(|path| path.ends_with("/cs1")))?
            .clone();
        let name = |key: &str| server[key].as_str().unwrap_or_default().to_owned();
        (server["state"] == "active").then(|| [name("site"), name("room"), name("row"), name("rack")].join("/"))
    };
    assert_eq!(place(node).as_deref(), Some("/hall//A1"), "as make-cs was told");
    node.done(&["cs", "set-location", "-r", "cs1", "--rack", "A2", "--site", "north"]);
    process::signal(node.child("cs1").id(), libc::SIGTERM);
    poll("the chunk server stops", LIMIT, || node.child("cs1").try_wait().expect("wait"));
    node.running.retain(|(name, _)| name != "cs1");
    node.run("cs", "cs1");
    poll("the new place is known", LIMIT, || (place(node)? == "north/hall//A2").then_some(()));
    assert!(node.done(&["stat"]).contains("site north, room hall, rack A2"), "stat shows it");
}

fn removes_a_metadata_server(first: &mut Node, third: &mut Node) {
    let stat = first.stat().expect("the cluster answers");
    let follower = stat["mds"].as_array().expect("a list").iter().find(|mds| mds["leader"] == false);
    let id = follower.expect("a follower")["id"].to_string();
    // The one that goes must be the third here, so that its process can be watched.
    let id = if id == "2" { "3".to_owned() } else { id };
    if stat["mds"].as_array().expect("a list").iter().any(|mds| mds["leader"] == true && mds["id"] == 3) {
        eprintln!("the third metadata server leads and is removed while it does");
    }
    let id = if id == "1" { "3".to_owned() } else { id };
    first.done(&["rm-mds", &id]);
    first.wait_for("two metadata servers are left", |stat| {
        voters(stat) == 2 && stat["mds"].as_array().map(Vec::len) == Some(2)
    });
    poll("the removed server ends by itself", LIMIT, || third.child("mds3").try_wait().expect("wait"));
    first.cairn(&["rm-mds", "99"]).must_fail("an unknown server", 1, "99");
}

#[test]
fn mistakes_are_refused_with_their_reason() {
    let scratch = scratch();
    let addrs = free_addrs(4);
    let mut node = Node::new(scratch.path(), "etc");
    let words = ["make-mds", "-I", "-p", "-a", &addrs[0], "-r", "mds1"];
    node.with_password(&words, "short\n").must_fail("a short password", 2, "use at least 8");
    node.with_password(&words, "").must_fail("no password", 1, "no password on standard input");
    first_mds(&mut node, &addrs[0]);
    let stranger = Node::new(scratch.path(), "etc-new");
    stranger.cairn(&["stat"]).must_fail("an unknown cluster", 1, "cluster hand is not known on this host");
    let outcome = stranger.with_password(&["-c", "other", "auth-node", "-b", &addrs[0]], PASSWORD);
    assert!(matches!(outcome.code, 3 | 4), "{}", outcome.text());
    assert!(outcome.stderr.contains("the server belongs to cluster `hand`, not `other`"), "{}", outcome.text());
    node.cairn(&["-c", "no name!", "stat"]).must_fail("a bad name", 2, "is not a cluster name");
    node.cairn(&["--mds-addr", &addrs[3], "stat"]).must_fail("nobody listens", 3, "no metadata server");
    node.cairn(&["frobnicate"]).must_fail("an unknown verb", 2, "frobnicate");

    std::fs::create_dir(scratch.path().join("full")).expect("make a directory");
    std::fs::write(scratch.path().join("full/file"), "mine").expect("make a file");
    node.cairn(&["make-mds", "-a", &addrs[1], "-r", "full"]).must_fail("a full directory", 1, "is not empty");
    node.cairn(&["make-cs", "-a", &addrs[1], "-r", "full", "--size", "1G"]).must_fail(
        "a full directory",
        1,
        "is not empty",
    );
    node.cairn(&["make-mds", "-a", "0.0.0.0:4000", "-r", "mds2"]).must_fail("a wildcard", 2, "not a wildcard");
    let words = ["make-mds", "-a", &addrs[0], "-r", "mds2"];
    node.cairn(&words).must_fail("an address in use", 1, "another process listens there");
    let words = ["--mds-addr", &addrs[3], "make-mds", "-a", &addrs[1], "-r", "mds2"];
    node.cairn(&words).must_fail("nobody admits it", 3, "ask the cluster for admission");
    let words = ["make-mds", "-p", "-a", &addrs[1], "-r", "mds2"];
    node.with_password(&words, "wrong password\n").must_fail("a wrong password", 4, "authentication failed");
    assert!(!scratch.path().join("mds2").exists(), "what failed leaves no directory behind");
    node.cairn(&["stat"]).must_succeed("stat: the key is still the right one");
    node.cairn(&["sim"]).must_fail("nothing to simulate", 2, "give one of");
    let words = ["nbd", "serve", "x", "--no-tcp"];
    node.cairn(&words).must_fail("nowhere to listen", 2, "nothing to listen on");
    node.cairn(&["nbd", "serve", "x", "--listen", "1.2.3.4:x"]).must_fail("no port", 2, "is not a port number");
    node.cairn(&["--mds-addr", "::::", "stat"]).must_fail("no address", 2, "::::");
    node.cairn(&["bench", "--bs", "7"]).must_fail("no block size", 2, "--bs 7");
    node.cairn(&["cs", "set-location", "-r", "cs1"]).must_fail("no name", 2, "give at least one");

    std::fs::create_dir(scratch.path().join("bad")).expect("make a directory");
    std::fs::write(scratch.path().join("bad/mds.json"), "{}").expect("write a file");
    node.cairn(&["mds", "run", "-r", "bad"]).must_fail("a damaged identity", 1, "cairn rm-mds");
    std::fs::write(scratch.path().join("bad/cs.conf"), "format = 1\n?\n").expect("write a file");
    node.cairn(&["cs", "run", "-r", "bad"]).must_fail("a damaged identity", 1, "is damaged, line 2");
    node.cairn(&["mds", "run", "-r", "full"]).must_fail("no repository", 1, "no repository of a metadata server");
    node.cairn(&["cs", "run", "-r", "full"]).must_fail("no repository", 1, "is not the directory of a chunk server");
    node.cairn(&["mds", "run", "-r", "mds1"]).must_fail("a second process", 1, "is in use by another process");

    let taken = TcpListener::bind(&addrs[2]).expect("bind");
    node.done(&["make-cs", "-r", "cs1", "-a", &addrs[2], "--size", "1G", "--rack", "A1", "--room", "hall"]);
    let outcome = node.cairn(&["cs", "run", "-r", "cs1"]);
    outcome.must_fail("a port in use", 1, &addrs[2]);
    assert!(outcome.stderr.contains("another process"), "{}", outcome.text());
    drop(taken);
    node.cairn(&["make-cs", "-r", "cs1", "-a", &addrs[2]]).must_fail("made before", 1, "chunk server");
    node.run("cs", "cs1");
    node.wait_for("the chunk server is active", |stat| active(stat) == 1);
    node.cairn(&["cs", "run", "-r", "cs1"]).must_fail("a second process", 1, "in use");
    places_are_told(&mut node);
}

#[test]
fn a_directory_of_another_cluster_is_not_taken() {
    let scratch = scratch();
    let addrs = free_addrs(4);
    let mut node = Node::new(scratch.path(), "etc");
    first_mds(&mut node, &addrs[0]);
    node.done(&["make-cs", "-r", "cs1", "-a", &addrs[2], "--size", "1G"]);
    // A cluster of another name, and one of the same name made anew.
    let other = Node::new(scratch.path(), "etc-other");
    let words = ["-c", "other", "make-mds", "-I", "-p", "-a", &addrs[1], "-r", "mds-other"];
    other.with_password(&words, PASSWORD).must_succeed("make-mds -I");
    let outcome = node.cairn(&["mds", "run", "-r", "mds-other"]);
    outcome.must_fail("a server of a cluster this node does not know", 1, "cluster other is not known on this host");
    let mut again = Node::new(scratch.path(), "etc-again");
    let words = ["make-mds", "-I", "-p", "-a", &addrs[3], "-r", "mds-again"];
    again.with_password(&words, PASSWORD).must_succeed("make-mds -I");
    again.run("mds", "mds-again");
    again.wait_for("the second cluster serves", |stat| voters(stat) == 1);
    // It asks for a while, since lists of servers are sometimes wrong for a moment, and is never let in.
    again.run("cs", "cs1");
    let status = poll("the server gives up", LIMIT, || again.child("cs1").try_wait().expect("wait"));
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(scratch.path().join("cs1.log")).expect("it has a log");
    assert!(log.contains("make a chunk server anew in a new directory"), "{log}");
    assert_eq!(again.stat().map(|stat| active(&stat)), Some(0));
}
