//! I21: every metadata server is lost, the metadata are made anew from the chunk servers, and every flushed byte is
//! read.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::poll;
use cairn_tests::stamped::{Model, Target};
use cairn_tests::tree;
use serde_json::Value;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Blocks of each load: 192 MiB, three chunks.
const BLOCK_COUNT: u64 = 49_152;
const LIMIT: Duration = Duration::from_secs(60);
const HEAL_LIMIT: Duration = Duration::from_secs(180);

/// A cluster with data on a block volume, in a file and in a tree, everything flushed.
struct Loaded {
    cluster: Cluster,
    volume: Model,
    file: Model,
    source: PathBuf,
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open the file")
}

fn flush_all(mount: &Path, source: &Path, copy: &str) {
    for entry in tree::digest(source).expect("read the source").keys() {
        let path = mount.join(copy).join(entry);
        if path.is_file() {
            File::open(path).and_then(|file| file.sync_all()).expect("fsync");
        }
    }
}

fn load() -> Loaded {
    let cluster = Cluster::start(Duration::from_secs(600));
    let source = cluster.beside("source");
    tree::make(&source, 200, 5).expect("make the source tree");
    copy_tree(&cluster, &source, "copy");
    let (mut volume, mut file) = (Model::new(6), Model::new(7));
    let (mut nbd, mut stamped) = (cluster.nbd(), open(&cluster.mount().join("stamped")));
    stamped.set_len(BLOCK_COUNT * 4096).expect("set its length");
    volume.run_steps(&mut nbd, BLOCK_COUNT, 300);
    file.run_steps(&mut stamped, BLOCK_COUNT, 300);
    volume.flush(&mut nbd).expect("flush");
    file.flush(&mut stamped).expect("fsync");
    Loaded { cluster, volume, file, source }
}

fn copy_tree(cluster: &Cluster, source: &Path, name: &str) {
    let target = cluster.mount().join(name).display().to_string();
    cluster.tool("cp", &["-a", &source.display().to_string(), &target], LIMIT);
    flush_all(&cluster.mount(), source, name);
}

impl Loaded {
    /// Kills everything, removes the directories of the metadata servers but those to keep, and returns the arguments
    /// of a recovery into the first one.
    fn strike(&mut self, keep: &[&str]) -> Vec<String> {
        self.cluster.kill_everything();
        let dir = self.cluster.dir().to_owned();
        for name in ["mds1", "mds2", "mds3"].iter().filter(|name| !keep.contains(name)) {
            std::fs::remove_dir_all(dir.join(name)).expect("remove the directory of a metadata server");
        }
        let path = |name: &str| dir.join(name).display().to_string();
        let fixed = ["recover-metadata", "-r", &path("mds1"), "-a", &format!("127.0.0.1:{}", self.mds_port(0))];
        let servers = ["cs1", "cs2", "cs3", "cs4"].map(path);
        fixed.iter().map(|word| (*word).to_owned()).chain(servers).collect()
    }

    fn mds_port(&self, index: usize) -> u64 {
        let text = std::fs::read_to_string(self.cluster.dir().join("quickstart.json")).expect("read quickstart.json");
        let state: Value = serde_json::from_str(&text).expect("JSON");
        state["mds_ports"][index].as_u64().expect("a port")
    }

    fn recover(&self, words: &[String], more: &[&str]) -> String {
        let words: Vec<&str> = words.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let planned =
            self.cluster.cairn(&[&words[..], &["--dry-run"]].concat()).must_succeed("recover-metadata --dry-run");
        assert!(!self.cluster.dir().join("mds1").exists(), "a dry run makes nothing");
        let done = self.cluster.cairn(&words).must_succeed("recover-metadata");
        assert_eq!(planned, done, "the dry run said what would be done");
        eprintln!("{done}");
        done
    }

    /// Runs the recovered metadata server, adds two more, runs a verb, and hands the cluster back to `quickstart`.
    fn start(&mut self, then: &[&str]) {
        self.cluster.restart("mds1");
        poll("the recovered metadata server serves", LIMIT, || self.cluster.json(&["stat"]));
        for index in [1, 2] {
            let label = format!("mds{}", index + 1);
            let dir = self.cluster.dir().join(&label);
            let _ = std::fs::remove_dir_all(&dir);
            let addr = format!("127.0.0.1:{}", self.mds_port(index));
            let words = ["make-mds", "-r", &dir.display().to_string(), "-a", &addr];
            self.cluster.cairn(&words).must_succeed("make-mds");
            self.cluster.restart(&label);
        }
        poll("three metadata servers vote", LIMIT, || {
            let stat = self.cluster.json(&["stat"])?;
            let voters = stat["mds"].as_array()?.iter().filter(|mds| mds["voter"] == true).count();
            (voters == 3).then_some(())
        });
        if !then.is_empty() {
            self.cluster.cairn(then).must_succeed("a verb after the recovery");
        }
        self.cluster.kill_everything();
        self.cluster.start_again();
    }

    /// The operator has looked: what waited goes on, and every chunk gets all its copies.
    fn confirm(&mut self) {
        self.cluster.cairn(&["set-config", "mds.recovery.hold=0"]).must_succeed("set-config");
        self.cluster.wait_until_healthy(HEAL_LIMIT);
        self.cluster.stop();
    }
}

/// A file that may end before the last block of the model: past its end are zeros, as in the volume it was.
struct Padded(File);

impl Target for Padded {
    fn read_block(&mut self, block: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        self.0.read_at(buffer, block * 4096).map(|_| ())
    }

    fn write_blocks(&mut self, block: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, block * 4096)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }
}

#[test]
fn all_metadata_lost_with_a_backup_every_name_and_flushed_byte_is_back() {
    needs_fuse!();
    let mut loaded = load();
    let backup = loaded.cluster.beside("metadata.backup").display().to_string();
    loaded.cluster.cairn(&["backup-metadata", &backup]).must_succeed("backup-metadata");
    let refused = ["recover-metadata", "-r", "/nowhere/mds", "-a", "127.0.0.1:1", "/nowhere/cs"];
    loaded.cluster.cairn(&refused).must_fail("a recovery beside a living group", 1, "there is nothing to recover");
    // After the backup: a chunk server that misses writes, more data in what the backup knows, and a file it does not.
    let mount = loaded.cluster.mount();
    loaded.cluster.kill("cs2");
    loaded.file.run_steps(&mut open(&mount.join("stamped")), BLOCK_COUNT, 100);
    loaded.file.flush(&mut open(&mount.join("stamped"))).expect("fsync");
    loaded.volume.run_steps(&mut loaded.cluster.nbd(), BLOCK_COUNT, 100);
    loaded.volume.flush(&mut loaded.cluster.nbd()).expect("flush");
    std::fs::write(mount.join("late"), vec![0x5a; 70_000]).expect("write a file");
    File::open(mount.join("late")).and_then(|file| file.sync_all()).expect("fsync");
    let words = loaded.strike(&[]);
    let report = loaded.recover(&words, &["--from-backup", &backup]);
    assert!(report.contains("/recovered/volume-"), "the late file got a name: {report}");
    assert!(!report.contains(" 0 old or incomplete copies"), "cs2 has old copies: {report}");
    loaded.start(&[]);
    tree::compare(&loaded.source, &mount.join("copy"));
    let blocks = loaded.volume.check_all(&mut loaded.cluster.nbd(), true);
    let file_blocks = loaded.file.check_all(&mut open(&mount.join("stamped")), true);
    let late = std::fs::read_dir(mount.join("recovered")).expect("list").flatten().any(|entry| {
        let bytes = std::fs::read(entry.path()).expect("read a recovered file");
        bytes.len() == 73_728 && bytes[..70_000].iter().all(|byte| *byte == 0x5a)
    });
    assert!(late, "what the late file held is in one of the recovered files");
    eprintln!("{blocks} blocks of the volume and {file_blocks} of the file are as flushed");
    loaded.confirm();
}

#[test]
fn all_metadata_lost_without_a_backup_every_flushed_byte_is_back_under_new_names() {
    needs_fuse!();
    let mut loaded = load();
    let info = loaded.cluster.json(&["volume", "list"]).expect("list the volumes");
    let id = info.as_array().and_then(|all| all[0]["id"].as_u64()).expect("the number of the volume");
    let stamped =
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(loaded.cluster.mount().join("stamped")).expect("stat"));
    let words = loaded.strike(&[]);
    loaded.recover(&words, &["--block-volumes", &id.to_string(), "--replicas", "3"]);
    loaded.start(&["volume", "rename", &format!("recovered-{id}"), "demo"]);
    let mount = loaded.cluster.mount();
    let mut file = Padded(open(&mount.join(format!("recovered/volume-{stamped}"))));
    let file_blocks = loaded.file.check_all(&mut file, true);
    // Each file of the tree is one of the recovered files, to the last byte and padded to a block.
    let mut found = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(mount.join("recovered")).expect("list").flatten() {
        let bytes = std::fs::read(entry.path()).expect("read a recovered file");
        found.insert(tree::checksum(&bytes));
    }
    let mut files = 0;
    for entry in tree::digest(&loaded.source).expect("read the source").keys() {
        let path = loaded.source.join(entry);
        if !path.is_file() || path.is_symlink() {
            continue;
        }
        let mut bytes = std::fs::read(&path).expect("read the source");
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        while bytes.len() >= 4096 && bytes[bytes.len() - 4096..].iter().all(|byte| *byte == 0) {
            bytes.truncate(bytes.len() - 4096);
        }
        assert!(bytes.is_empty() || found.contains(&tree::checksum(&bytes)), "{} is not found", path.display());
        files += 1;
    }
    drop(file);
    let blocks = loaded.volume.check_all(&mut loaded.cluster.nbd(), true);
    eprintln!("{blocks} blocks of the volume, {file_blocks} of the file and {files} files are as flushed");
    loaded.confirm();
}

#[test]
fn one_surviving_metadata_directory_brings_every_name_back() {
    needs_fuse!();
    let mut loaded = load();
    let words = loaded.strike(&["mds2"]);
    let survivor = loaded.cluster.dir().join("mds2").display().to_string();
    let report = loaded.recover(&words, &["--from-mds", &survivor]);
    assert!(!report.contains("LOST"), "{report}");
    loaded.start(&[]);
    tree::compare(&loaded.source, &loaded.cluster.mount().join("copy"));
    loaded.volume.check_all(&mut loaded.cluster.nbd(), true);
    loaded.file.check_all(&mut open(&loaded.cluster.mount().join("stamped")), true);
    loaded.confirm();
}
