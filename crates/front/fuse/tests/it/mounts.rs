//! One mount as programs use it.

use crate::TestMount;
use crate::world::Cluster;
use cairn_fuse::MountError;
use cairn_stdx::{Rng, checksum::crc64};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: no {program} here");
    }
    found
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
}

fn posix(options: &str) {
    let cluster = Cluster::start(21);
    if let Some(mount) = TestMount::new(&cluster, options) {
        posix_on(&mount);
    }
}

/// Runs the POSIX script on a mount that allows devices and set-user-id.
pub fn posix_on(mount: &TestMount) {
    if has("python3") {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/posix.py");
        run(Command::new("python3").arg(script).arg(mount.path()));
    }
}

#[test]
fn posix_as_programs_know_it() {
    posix("dev,suid");
}

#[test]
fn posix_with_writes_kept_by_the_kernel() {
    posix("dev,suid,writeback");
}

fn tree_sums(root: &Path, directory: &Path, sums: &mut BTreeMap<PathBuf, u64>) {
    for entry in fs::read_dir(directory).expect("list") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            tree_sums(root, &path, sums);
        } else {
            let name = path.strip_prefix(root).expect("inside").to_owned();
            let before = sums.insert(name, crc64(&fs::read(&path).expect("read")));
            assert_eq!(before, None, "an entry listed twice");
        }
    }
}

#[test]
fn a_tree_of_ten_thousand_files_comes_back_as_it_was() {
    let cluster = Cluster::start(22);
    let Some(mut mount) = TestMount::new(&cluster, "") else { return };
    let mut rng = Rng::new(22);
    let mut written = BTreeMap::new();
    let calls_before = cluster.calls();
    for directory in 0..100 {
        let directory = PathBuf::from(format!("d{directory}"));
        fs::create_dir(mount.path().join(&directory)).expect("mkdir");
        for file in 0..100 {
            let name = directory.join(format!("file with a name {file}"));
            let mut data = vec![0; rng.below(6000) as usize];
            rng.fill(&mut data);
            fs::write(mount.path().join(&name), &data).expect("write");
            written.insert(name, crc64(&data));
        }
    }
    let calls = (cluster.calls() - calls_before) as f64 / 10_000.0;
    // Create and size; before them the kernel asks for the name and for the directory, whose times just changed. The
    // rest are leases that go because too many files rest.
    assert!(calls < 5.0, "{calls} calls a file");
    let mut found = BTreeMap::new();
    tree_sums(mount.path(), mount.path(), &mut found);
    assert!(found == written, "right after writing");
    mount.unmount();
    let mount = TestMount::new(&cluster, "").expect("mounts again");
    let mut found = BTreeMap::new();
    tree_sums(mount.path(), mount.path(), &mut found);
    assert!(found == written, "after a remount");
    fs::remove_dir_all(mount.path().join("d7")).expect("remove a directory");
    assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 99);
}

#[test]
fn one_large_directory_lists_every_entry_once() {
    let cluster = Cluster::start(23);
    let Some(mount) = TestMount::new(&cluster, "") else { return };
    for number in 0..3000 {
        File::create(mount.path().join(format!("entry-{number:05}-{}", "x".repeat(number % 200)))).expect("create");
    }
    let mut seen: Vec<String> =
        fs::read_dir(mount.path()).expect("list").map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3000);
    // Removing while listing must neither skip nor repeat what stays.
    let mut left = 3000;
    for entry in fs::read_dir(mount.path()).expect("list") {
        fs::remove_file(entry.expect("entry").path()).expect("every entry exists when it is listed");
        left -= 1;
    }
    assert_eq!(left, 0);
}

#[test]
fn git_keeps_a_repository_here() {
    let cluster = Cluster::start(24);
    let Some(mount) = TestMount::new(&cluster, "") else { return };
    if !has("git") {
        return;
    }
    let work = mount.path().join("repo");
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(&work).args(["-c", "user.name=t", "-c", "user.email=t@localhost"]).args(arguments);
        command.env("GIT_CONFIG_NOSYSTEM", "1").env("HOME", &work);
        run(&mut command);
    };
    fs::create_dir(&work).expect("mkdir");
    git(&["init", "-q", "-b", "main"]);
    for commit in 0..5 {
        for file in 0..40 {
            fs::write(work.join(format!("f{file}")), format!("{commit} {file}\n").repeat(200)).expect("write");
        }
        git(&["add", "-A"]);
        git(&["commit", "-q", "-m", "more"]);
    }
    git(&["gc", "-q"]);
    git(&["checkout", "-q", "-b", "side", "HEAD~2"]);
    git(&["checkout", "-q", "main"]);
    git(&["fsck", "--full", "--strict"]);
    git(&["diff", "--exit-code"]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let cluster = Cluster::start(25);
    let Some(mount) = TestMount::new(&cluster, "") else { return };
    fio_on(&mount, "24m");
}

/// Writes at random and verifies, through the page cache, around it, and through a memory map.
pub fn fio_on(mount: &TestMount, size: &str) {
    if !has("fio") {
        return;
    }
    for (name, direct, engine) in [("cached", "0", "psync"), ("direct", "1", "libaio"), ("mapped", "0", "mmap")] {
        let mut fio = Command::new("fio");
        fio.current_dir(mount.path()).arg(format!("--name={name}"));
        fio.arg(format!("--size={size}")).args([
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--iodepth=16",
            "--verify=crc32c",
        ]);
        fio.args(["--do_verify=1", "--verify_fatal=1", "--end_fsync=1"]);
        fio.arg(format!("--direct={direct}")).arg(format!("--ioengine={engine}"));
        run(&mut fio);
    }
}

#[test]
fn unmounting_a_busy_mount_names_who_holds_it() {
    let cluster = Cluster::start(26);
    let Some(mut mount) = TestMount::new(&cluster, "") else { return };
    let file = File::create(mount.path().join("held")).expect("create");
    let refused = mount.mounted.unmount().expect_err("busy");
    let MountError::Busy { holders, .. } = &refused else { panic!("{refused}") };
    assert!(holders.iter().any(|(pid, _)| *pid == std::process::id()), "{refused}");
    drop(file);
    mount.unmount();
    assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 0, "the bare directory is back");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let cluster = Cluster::start(27);
    {
        let Some(mount) = TestMount::new(&cluster, "") else { return };
        fs::write(mount.path().join("f"), b"text").expect("write");
    }
    let mount = TestMount::new(&cluster, "ro").expect("mount");
    assert_eq!(fs::read(mount.path().join("f")).expect("read"), b"text");
    for refused in [fs::write(mount.path().join("f"), b"x"), fs::create_dir(mount.path().join("d"))] {
        assert_eq!(refused.expect_err("read-only").raw_os_error(), Some(libc::EROFS));
    }
    let table = fs::read_to_string("/proc/self/mounts").expect("mount table");
    let line = table.lines().find(|line| line.contains(mount.path().to_str().unwrap())).expect("mounted");
    assert!(line.starts_with("cairn://test ") && line.contains(" fuse.cairn ro,"), "{line}");
}

#[test]
fn reopening_a_file_just_closed_asks_nobody() {
    let cluster = Cluster::start(28);
    let Some(mount) = TestMount::new(&cluster, "") else { return };
    let path = mount.path().join("f");
    fs::write(&path, vec![5; 100_000]).expect("write");
    fs::read(&path).expect("read");
    let before = cluster.calls();
    for _ in 0..50 {
        assert_eq!(fs::read(&path).expect("read").len(), 100_000);
    }
    // A lookup now and then when the name's second is over; never a lease.
    assert!(cluster.calls() - before <= 10, "{} calls", cluster.calls() - before);
}

#[test]
#[ignore = "prints figures; run it alone, in a release build"]
fn figures() {
    let cluster = Cluster::start(29);
    if let Some(mount) = TestMount::new(&cluster, "threads=2") {
        figures_on(&mount);
    }
}

/// Prints what fio measures, and how fast small files are made.
pub fn figures_on(mount: &TestMount) {
    for (name, rest) in [
        ("one writer, 4 KiB", "--rw=randwrite --bs=4k --direct=1 --ioengine=psync"),
        ("one reader, 4 KiB", "--rw=randread --bs=4k --direct=1 --ioengine=psync"),
        ("32 writes in flight", "--rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32"),
        ("32 reads in flight", "--rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32"),
        ("cached small writes", "--rw=write --bs=4k --direct=0 --ioengine=psync"),
        ("sequential writes", "--rw=write --bs=1m --direct=0 --ioengine=psync"),
        ("sequential reads", "--rw=read --bs=1m --direct=0 --invalidate=1 --ioengine=psync"),
    ] {
        let mut fio = Command::new("fio");
        fio.current_dir(mount.path()).args(["--name=f", "--filename=f", "--size=128m", "--runtime=3", "--time_based"]);
        fio.args(["--output-format=terse", "--terse-version=3"]).args(rest.split(' '));
        let output = fio.output().expect("fio");
        let text = String::from_utf8_lossy(&output.stdout);
        let fields: Vec<&str> = text.trim().split(';').collect();
        let (read, write) = (fields.get(7).unwrap_or(&"?"), fields.get(48).unwrap_or(&"?"));
        println!("{name}: {read} reads/s, {write} writes/s");
    }
    let mut created = 0;
    let mut python = Command::new("python3");
    python.current_dir(mount.path()).arg("-c");
    python.arg(
        "import time\nt = time.time()\nfor i in range(2000):\n    f = open(f'small{i}', 'wb'); f.write(b'x' * 3000); f.close()\n\
         print(int(2000 / (time.time() - t)))",
    );
    if let Ok(output) = python.output() {
        created = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or(0);
    }
    println!("small files created, written and closed: {created}/s");
}

#[test]
fn link_counts_follow_every_change_of_a_name() {
    let Some(mount) = TestMount::new(&Cluster::start(14), "") else { return };
    let (one, two) = (mount.path().join("one"), mount.path().join("two"));
    let mut file = fs::File::create(&one).expect("create");
    std::io::Write::write_all(&mut file, b"x").expect("write");
    fs::hard_link(&one, &two).expect("link");
    assert_eq!(file.metadata().expect("stat").nlink(), 2);
    assert_eq!(fs::metadata(&one).expect("stat").nlink(), 2);
    fs::remove_file(&two).expect("unlink");
    assert_eq!(file.metadata().expect("stat").nlink(), 1);
    fs::hard_link(&one, &two).expect("link");
    fs::write(mount.path().join("three"), b"y").expect("write");
    fs::rename(mount.path().join("three"), &two).expect("replace one of the names");
    assert_eq!(file.metadata().expect("stat").nlink(), 1);
    fs::remove_file(&one).expect("unlink");
    assert_eq!(file.metadata().expect("stat").nlink(), 0);
}

#[test]
fn times_before_1970_and_names_of_attributes_are_as_elsewhere() {
    let Some(mount) = TestMount::new(&Cluster::start(15), "") else { return };
    let path = mount.path().join("f");
    let file = File::create(&path).expect("create");
    let time = std::time::UNIX_EPOCH - std::time::Duration::new(86_400 * 400, 250);
    file.set_times(fs::FileTimes::new().set_modified(time).set_accessed(time)).expect("utimensat");
    drop(file);
    let known = fs::metadata(&path).expect("stat");
    assert_eq!((known.modified().expect("mtime"), known.accessed().expect("atime")), (time, time));
    if has("setfattr") {
        let set = |name: &str| {
            let mut command = Command::new("setfattr");
            command.args(["-n", name, "-v", "x"]).arg(&path).output().expect("it starts").status.success()
        };
        assert!(set("user.a") && set("trusted.a"));
        assert!(!set("a") && !set("user.") && !set("system.a"));
    }
}
