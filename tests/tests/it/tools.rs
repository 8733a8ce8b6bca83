//! Stock clients: fio, ext4 in a file, qemu-img, nbdcopy, tar, git.

use crate::{needs, needs_fuse};
use cairn_stdx::Rng;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, is_root};
use cairn_tests::tree;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CLUSTER_LIMIT: Duration = Duration::from_secs(500);
const TOOL_LIMIT: Duration = Duration::from_secs(240);

fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

fn fio(cluster: &Cluster, words: &[&str]) {
    let fixed = ["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=1"];
    let fixed: Vec<&str> = fixed.into_iter().chain(["--output-format=terse", "--group_reporting"]).collect();
    // Its working directory takes the state file of a failed verification.
    let mut command = cluster.command("fio");
    command.args(words).args(&fixed).current_dir(cluster.dir());
    process::run(&mut command, TOOL_LIMIT).must_succeed(&format!("fio {}", words.join(" ")));
}

#[test]
fn fio_verifies_random_writes_through_nbd() {
    needs!("fio");
    let cluster = Cluster::start(CLUSTER_LIMIT);
    if !cluster.tool("fio", &["--enghelp"], TOOL_LIMIT).lines().any(|line| line.trim() == "nbd") {
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let uri = format!("--uri={}", cluster.nbd_uri());
    let common = ["--name=nbd", "--ioengine=nbd", uri.as_str(), "--iodepth=16"];
    fio(&cluster, &[&common[..], &["--bs=4k", "--size=64m"]].concat());
    fio(&cluster, &[&common[..], &["--bsrange=512-128k", "--offset=256m", "--size=128m"]].concat());
}

#[test]
fn fio_verifies_random_writes_through_the_mount() {
    needs_fuse!();
    needs!("fio");
    let cluster = Cluster::start(CLUSTER_LIMIT);
    let file = format!("--filename={}", text(cluster.mount().join("fio")));
    let common = ["--name=mount", "--ioengine=psync", file.as_str()];
    fio(&cluster, &[&common[..], &["--bs=4k", "--size=48m", "--fsync=64"]].concat());
    fio(&cluster, &[&common[..], &["--bsrange=4k-256k", "--size=128m", "--direct=1"]].concat());
}

/// A mounted loop device, taken apart in the right order whatever happens.
struct LoopMount {
    device: String,
    dir: PathBuf,
}

impl LoopMount {
    fn new(cluster: &Cluster, image: &str, dir: PathBuf) -> Self {
        let device = cluster.tool("losetup", &["-f", "--show", image], TOOL_LIMIT).trim().to_owned();
        let mount = Self { device, dir };
        std::fs::create_dir_all(&mount.dir).expect("make the mount point");
        cluster.tool("mount", &["-t", "ext4", &mount.device, &text(&mount.dir)], TOOL_LIMIT);
        mount
    }

    fn finish(self, cluster: &Cluster) {
        cluster.tool("umount", &[&text(&self.dir)], TOOL_LIMIT);
        cluster.tool("losetup", &["-d", &self.device], TOOL_LIMIT);
        std::mem::forget(self);
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        process::unmount_lazily(&self.dir);
        let _ = std::process::Command::new("losetup").args(["-d", &self.device]).status();
    }
}

#[test]
fn an_ext4_file_system_in_a_file_of_the_mount_stays_whole() {
    needs_fuse!();
    needs!("mkfs.ext4", "e2fsck", "losetup", "mount");
    let cluster = Cluster::start(CLUSTER_LIMIT);
    if !is_root() || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: loop devices want root and /dev/loop-control");
        return;
    }
    let image = text(cluster.mount().join("disk.img"));
    std::fs::File::create(&image).and_then(|file| file.set_len(400 << 20)).expect("make the image");
    cluster.tool("mkfs.ext4", &["-q", "-F", &image], TOOL_LIMIT);
    let (source, inner) = (cluster.beside("source"), cluster.beside("inner"));
    tree::make(&source, 3000, 21).expect("make the source tree");
    let mounted = LoopMount::new(&cluster, &image, inner.clone());
    cluster.tool("cp", &["-a", &text(&source), &text(inner.join("copy"))], TOOL_LIMIT);
    cluster.tool("sync", &["-f", &text(&inner)], TOOL_LIMIT);
    mounted.finish(&cluster);
    cluster.tool("e2fsck", &["-f", "-n", &image], TOOL_LIMIT);
    let mounted = LoopMount::new(&cluster, &image, inner.clone());
    let entries = tree::compare(&source, &inner.join("copy"));
    mounted.finish(&cluster);
    eprintln!("{entries} entries are whole in ext4 in a file");
}

#[test]
fn images_go_in_and_out_through_qemu_img_and_nbdcopy() {
    needs!("qemu-img");
    let cluster = Cluster::start(CLUSTER_LIMIT);
    let (raw, qcow, back) = (cluster.beside("in.raw"), cluster.beside("in.qcow2"), cluster.beside("out.raw"));
    let mut rng = Rng::new(31);
    let mut bytes = vec![0; 96 << 20];
    // A third of it stays zero: holes must arrive as zeroes, also over old data.
    for part in bytes.chunks_exact_mut(1 << 20).filter(|_| rng.chance(2, 3)) {
        let mut inner = Rng::new(part.len() as u64).split(7);
        part.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&inner.next_u64().to_le_bytes()));
    }
    std::fs::write(&raw, &bytes).expect("write the image");
    cluster.tool("qemu-img", &["convert", "-O", "qcow2", &text(&raw), &text(&qcow)], TOOL_LIMIT);
    cluster.tool("cairn", &["volume", "create", "vm", "96M"], TOOL_LIMIT);
    let socket = text(cluster.dir().join("vm.sock"));
    let mut cluster = cluster;
    cluster.run_by_hand("nbdvm", &["nbd", "serve", "vm", "--no-tcp", "--unix", &socket]);
    process::poll("the second NBD server listens", Duration::from_secs(30), || {
        std::os::unix::net::UnixStream::connect(&socket).ok()
    });
    let uri = format!("nbd+unix:///vm?socket={socket}");
    // Twice, the second time over what the first left.
    for _ in 0..2 {
        cluster.tool("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", &text(&qcow), &uri], TOOL_LIMIT);
        cluster.tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &text(&qcow), &uri], TOOL_LIMIT);
    }
    cluster.tool("qemu-img", &["bench", "-w", "-c", "2000", "-d", "8", "-f", "raw", &uri], TOOL_LIMIT);
    if process::have_tools(&["nbdcopy"]) {
        cluster.tool("nbdcopy", &[&text(&raw), &uri], TOOL_LIMIT);
        cluster.tool("nbdcopy", &[&uri, &text(&back)], TOOL_LIMIT);
        let found = std::fs::read(&back).expect("read the copy");
        assert!(found == bytes, "nbdcopy brought back other bytes");
    }
}

fn unpack(file_count: u64) {
    let cluster = Cluster::start(CLUSTER_LIMIT + Duration::from_millis(file_count * 20));
    let (source, archive) = (cluster.beside("source"), cluster.beside("tree.tar"));
    tree::make(&source, file_count, 77).expect("make the source tree");
    cluster.tool("tar", &["-C", &text(&source), "-cf", &text(&archive), "."], TOOL_LIMIT);
    let target = cluster.mount().join("tree");
    std::fs::create_dir(&target).expect("make a directory");
    let limit = TOOL_LIMIT + Duration::from_millis(file_count * 10);
    let begun = process::now();
    cluster.tool("tar", &["-C", &text(&target), "-xf", &text(&archive)], limit);
    eprintln!("{file_count} files unpacked in {:.1} s", begun.elapsed().as_secs_f64());
    let begun = process::now();
    let entries = tree::compare(&source, &target);
    eprintln!("{entries} entries compared in {:.1} s", begun.elapsed().as_secs_f64());
    let begun = process::now();
    cluster.tool("rm", &["-rf", &text(&target)], limit);
    eprintln!("removed in {:.1} s", begun.elapsed().as_secs_f64());
    assert!(!target.exists(), "the tree is gone");
}

#[test]
fn a_tree_of_many_files_is_unpacked_whole() {
    needs_fuse!();
    needs!("tar");
    unpack(20_000);
}

#[test]
#[ignore = "long: sixty thousand files"]
fn a_tree_of_very_many_files_is_unpacked_whole() {
    needs_fuse!();
    needs!("tar");
    unpack(60_000);
}

#[test]
fn git_works_on_the_mount() {
    needs_fuse!();
    needs!("git");
    let cluster = Cluster::start(CLUSTER_LIMIT);
    let work = cluster.mount().join("work");
    tree::make(&work, 600, 91).expect("make files on the mount");
    let git = |words: &[&str]| {
        let mut command = cluster.command("git");
        // Nothing of the machine's configuration: it may sign, hook or refuse.
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").current_dir(&work);
        command.args(["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "gc.auto=0"]).args(words);
        process::run(&mut command, TOOL_LIMIT).must_succeed(&format!("git {}", words.join(" ")))
    };
    git(&["init", "-q", "-b", "main"]);
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "one"]);
    std::fs::write(work.join("d000/new"), "new").expect("write a file");
    std::fs::remove_dir_all(work.join("d001")).expect("remove a directory");
    git(&["add", "-A"]);
    git(&["commit", "-q", "-m", "two"]);
    git(&["gc", "-q", "--prune=now"]);
    git(&["fsck", "--full", "--strict"]);
    let clone = text(cluster.mount().join("clone"));
    git(&["clone", "-q", "--no-hardlinks", ".", &clone]);
    assert_eq!(git(&["status", "--porcelain"]), "", "nothing differs from what was committed");
    std::fs::remove_dir_all(work.join(".git")).expect("remove the repository");
    std::fs::remove_dir_all(Path::new(&clone).join(".git")).expect("remove the repository");
    tree::compare(&work, Path::new(&clone));
}
