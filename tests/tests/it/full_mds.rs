//! Metadata servers whose disks are full, or whose images rot: nothing stops, nothing acknowledged is lost, and all is
//! well again by itself.

use crate::{needs, needs_fuse};
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, is_root, poll};
use serde_json::Value;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(400);
const TOOL_LIMIT: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(60);
/// Size of a metadata server's disk: its log, the reserve, and some hundred megabytes.
const DISK: u64 = 800 << 20;
const XATTR: usize = 60_000;

/// File systems of their own under the directories of the metadata servers.
struct Disks {
    mounts: Vec<PathBuf>,
    devices: Vec<String>,
}

impl Disks {
    /// Moves what a stopped cluster keeps for its metadata servers to small file systems.
    fn new(cluster: &Cluster) -> Self {
        let mut disks = Self { mounts: Vec::new(), devices: Vec::new() };
        for label in ["mds1", "mds2", "mds3"] {
            let (dir, image) = (cluster.dir().join(label), cluster.beside(label));
            let text = |path: &Path| path.display().to_string();
            File::create(&image).and_then(|file| file.set_len(DISK)).expect("make the image");
            cluster.tool("mkfs.ext4", &["-q", "-F", "-m", "0", &text(&image)], TOOL_LIMIT);
            let device = cluster.tool("losetup", &["-f", "--show", &text(&image)], TOOL_LIMIT).trim().to_owned();
            let aside = cluster.beside(&format!("{label}.aside"));
            fs::rename(&dir, &aside).and_then(|()| fs::create_dir(&dir)).expect("put the directory aside");
            cluster.tool("mount", &["-t", "ext4", &device, &text(&dir)], TOOL_LIMIT);
            disks.devices.push(device);
            disks.mounts.push(dir.clone());
            cluster.tool("cp", &["-a", &format!("{}/.", text(&aside)), &text(&dir)], TOOL_LIMIT);
            fs::remove_dir_all(aside).expect("remove the old place");
        }
        disks
    }

    /// Takes all room a metadata server has on its disk.
    fn fill(cluster: &Cluster, label: &str) {
        let filler = File::create(cluster.dir().join(label).join("filler")).expect("make the filler");
        let zeros = vec![0; 1 << 20];
        for step in [1 << 20, 4096] {
            while std::io::Write::write_all(&mut &filler, &zeros[..step]).is_ok() {}
        }
    }

    fn make_room(cluster: &Cluster, label: &str) {
        fs::remove_file(cluster.dir().join(label).join("filler")).expect("remove the filler");
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        self.mounts.iter().for_each(|dir| process::unmount_lazily(dir));
        for device in &self.devices {
            let _ = std::process::Command::new("losetup").args(["-d", device]).status();
        }
    }
}

#[expect(unsafe_code, reason = "setxattr(2)")]
fn set_xattr(path: &Path, value: &[u8]) -> std::io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both strings end with NUL, and the value is as long as is said.
    let result =
        unsafe { libc::setxattr(path.as_ptr(), c"user.filling".as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Labels of the metadata servers that have no room, as `stat` says.
fn without_room(cluster: &Cluster) -> Option<Vec<String>> {
    let stat = cluster.json(&["stat"])?;
    let mds = stat["mds"].as_array()?.iter().filter(|mds| mds["no_room"] == true);
    Some(mds.filter_map(|mds: &Value| mds["id"].as_u64()).map(|id| format!("mds{id}")).collect())
}

fn says(cluster: &Cluster, code: &str) -> bool {
    cluster.cairn(&["get-event"]).must_succeed("get-event").contains(code)
}

/// Makes directories until one is refused or so many are made.
fn make_dirs(dir: &Path, numbers: std::ops::Range<u32>) -> std::io::Result<()> {
    numbers.into_iter().try_for_each(|number| fs::create_dir(dir.join(format!("d{number}"))))
}

fn names(dir: &Path) -> usize {
    fs::read_dir(dir).expect("list").count()
}

/// Writes rubbish over sectors all over a file.
fn rot(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(path).expect("open the image");
    let len = file.metadata().expect("stat").len();
    for at in (0..len).step_by(40 << 10) {
        file.write_all_at(&[0xa5; 512], at / 512 * 512 + 1024).expect("write rubbish");
    }
}

#[test]
fn a_rotted_image_is_put_aside_and_the_state_comes_from_another_server() {
    needs_fuse!();
    let mut cluster = Cluster::start_sized(LIMIT, "512M");
    let tree = cluster.mount().join("tree");
    fs::create_dir(&tree).expect("mkdir");
    make_dirs(&tree, 0..600).expect("mkdir");
    for number in 0..600 {
        set_xattr(&tree.join(format!("d{number}")), &vec![b'x'; XATTR]).expect("setxattr");
    }
    // At rest, in each server in turn: the leader is among them.
    for label in ["mds1", "mds2", "mds3"] {
        cluster.kill(label);
        rot(&cluster.dir().join(label).join("image.redb"));
        cluster.restart(label);
        let log = cluster.dir().join("log").join(format!("{label}.log"));
        poll("it says what is wrong", PATIENCE, || {
            fs::read_to_string(&log).ok()?.contains("image is damaged").then_some(())
        });
        poll("it has the state again", PATIENCE, || {
            fs::read_to_string(&log).ok()?.contains("is installed").then_some(())
        });
        cluster.wait_until_healthy(PATIENCE);
        assert!(cluster.dir().join(label).join("image.damaged").exists(), "it is kept");
    }
    assert!(says(&cluster, "MDS-1034") && says(&cluster, "MDS-1035"));
    assert_eq!(names(&tree), 600);
    make_dirs(&tree, 600..700).expect("mkdir");

    // While it runs: what it reads from then on is not there. It does not end.
    let leader = cluster.leader();
    let pid = cluster.processes()[&leader];
    let log = cluster.dir().join("log").join(format!("{leader}.log"));
    let before = fs::read_to_string(&log).expect("read the log").matches("image is damaged").count();
    rot(&cluster.dir().join(&leader).join("image.redb"));
    for number in 0..600 {
        // Through whichever server leads; what the page cache of redb holds is still right.
        set_xattr(&tree.join(format!("d{number}")), &vec![b'y'; XATTR]).expect("setxattr");
    }
    let found = fs::read_to_string(&log).expect("read the log").matches("image is damaged").count() > before;
    eprintln!("rot under a running server was found: {found}");
    assert!(process::is_alive(pid));
    cluster.wait_until_healthy(PATIENCE);
    assert_eq!(names(&tree), 700);
    cluster.stop();
    cluster.start_again();
    cluster.wait_until_healthy(PATIENCE);
    assert_eq!(names(&tree), 700);
    cluster.stop();
}

#[test]
fn metadata_servers_with_full_disks_go_on_and_come_back() {
    needs_fuse!();
    needs!("mkfs.ext4", "losetup", "mount", "cp");
    if !is_root() || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: loop devices want root and /dev/loop-control");
        return;
    }
    let mut cluster = Cluster::start_sized(LIMIT, "512M");
    cluster.stop();
    let _disks = Disks::new(&cluster);
    cluster.start_again();
    cluster.wait_until_healthy(PATIENCE);
    let all = cluster.processes();
    let pids = |labels: &[&str]| labels.iter().map(|label| all[*label]).collect::<Vec<_>>();
    let servers = pids(&["mds1", "mds2", "mds3"]);
    let alive = || servers.iter().all(|pid| process::is_alive(*pid));

    // The disk of the leader is full: it leaves leading to one that has room.
    let full = cluster.leader();
    Disks::fill(&cluster, &full);
    poll("the leader says that it has no room", PATIENCE, || (without_room(&cluster)? == [full.clone()]).then_some(()));
    poll("another one leads", PATIENCE, || (cluster.leader() != full).then_some(()));
    assert!(says(&cluster, "MDS-1030") && says(&cluster, "MDS-1036") && !says(&cluster, "MDS-1037"));

    // The others go on, far beyond what the reserve of the full one holds: it waits, then it is stale.
    let tree = cluster.mount().join("tree");
    fs::create_dir(&tree).expect("mkdir");
    make_dirs(&tree, 0..1500).expect("two servers of three have room");
    for number in 0..1500 {
        set_xattr(&tree.join(format!("d{number}")), &vec![b'x'; XATTR]).expect("two servers of three have room");
    }
    assert!(alive(), "no metadata server stopped");
    let stale = ["MDS-1032", "MDS-1033", "MDS-1034"];
    poll("the full one is stale", PATIENCE, || stale.iter().any(|code| says(&cluster, code)).then_some(()));
    Disks::make_room(&cluster, &full);
    poll("it has room again", PATIENCE, || without_room(&cluster)?.is_empty().then_some(()));
    cluster.wait_until_healthy(PATIENCE);
    assert!(says(&cluster, "MDS-1031") && says(&cluster, "MDS-1035"));

    // All disks are full: what adds is refused, all else goes on.
    let labels = ["mds1", "mds2", "mds3"];
    labels.iter().for_each(|label| Disks::fill(&cluster, label));
    poll("all say that they have no room", PATIENCE, || (without_room(&cluster)?.len() == 3).then_some(()));
    poll("the refusal is an event", PATIENCE, || says(&cluster, "MDS-1037").then_some(()));
    let refused = make_dirs(&tree, 1500..1501).expect_err("there is no room for names");
    assert_eq!(refused.kind(), ErrorKind::StorageFull, "{refused}");
    for number in 0..1000 {
        fs::remove_dir(tree.join(format!("d{number}"))).expect("deleting works on full disks");
    }
    fs::rename(tree.join("d1000"), tree.join("renamed")).expect("renaming works on full disks");
    assert_eq!(names(&tree), 500);
    assert!(alive(), "no metadata server stopped");

    // One that is killed starts again on its full disk, and then all at once.
    cluster.kill("mds2");
    cluster.restart("mds2");
    poll("it follows again", PATIENCE, || {
        let stat = cluster.json(&["stat"])?;
        let follows = |mds: &Value| mds["state"] == "follower" || mds["state"] == "leader";
        stat["mds"].as_array()?.iter().all(follows).then_some(())
    });
    cluster.kill_everything();
    cluster.start_again();
    assert_eq!(names(&tree), 500);
    fs::remove_dir(tree.join("renamed")).expect("deleting works after a restart");
    poll("it is still refused", PATIENCE, || {
        let refused = make_dirs(&tree, 1500..1501).err()?;
        (refused.kind() == ErrorKind::StorageFull).then_some(())
    });

    labels.iter().for_each(|label| Disks::make_room(&cluster, label));
    poll("names are accepted again", PATIENCE, || make_dirs(&tree, 1500..1501).ok());
    assert!(says(&cluster, "MDS-1038"));
    cluster.wait_until_healthy(PATIENCE);
    let mut found: Vec<String> = fs::read_dir(&tree)
        .expect("list")
        .map(|entry| entry.expect("entry").file_name().into_string().unwrap())
        .collect();
    let mut expected: Vec<String> = (1001..1501).map(|number| format!("d{number}")).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "what was acknowledged is there, and nothing else");
    cluster.stop();
}
