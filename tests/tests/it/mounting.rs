//! Mounts as operators make them: with options, by mount(8)'s helper, over one whose process was killed.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, poll};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(200);
const STEP: Duration = Duration::from_secs(40);

/// Takes the mount away whatever happens; its process ends with it.
pub struct MountPoint(pub PathBuf);

impl MountPoint {
    fn text(&self) -> &str {
        self.0.to_str().expect("utf-8")
    }

    fn unmount(&self) {
        process::run(Command::new("umount").arg(&self.0), STEP).must_succeed("umount");
    }

    /// The line of the kernel's table about it.
    fn line(&self) -> String {
        let table = fs::read_to_string("/proc/self/mounts").expect("read the table");
        table.lines().rev().find(|line| line.split(' ').nth(1) == Some(self.text())).unwrap_or_default().to_owned()
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        while process::is_mounted(&self.0) {
            process::unmount_lazily(&self.0);
        }
    }
}

/// The process that serves a mount in the background.
fn server_of(dir: &Path) -> u32 {
    let wanted = dir.display().to_string();
    let pids = fs::read_dir("/proc").expect("list processes").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let words = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).into_owned();
        words.split('\0').any(|word| word == wanted) && words.split('\0').any(|word| word == "--foreground")
    };
    pids.into_iter().find(serves).expect("somebody serves the mount")
}

#[test]
fn mounts_take_options_come_by_fstab_and_replace_a_dead_one() {
    needs_fuse!();
    let cluster = Cluster::start_sized(LIMIT, "512M");
    let dir = MountPoint(cluster.beside("mounted"));
    fs::create_dir(&dir.0).expect("make a mount point");
    fs::write(cluster.mount().join("f"), b"content").expect("write");

    let log = cluster.beside("mount.log");
    let list = format!("ro,log={}", log.display());
    cluster.cairn(&["mount", dir.text(), "-o", &list]).must_succeed("mount -o ro");
    assert!(dir.line().contains(" fuse.cairn ro,"), "{}", dir.line());
    assert_eq!(fs::read(dir.0.join("f")).expect("read"), b"content");
    assert_eq!(fs::write(dir.0.join("f"), b"x").expect_err("read-only").kind(), ErrorKind::ReadOnlyFilesystem);
    assert!(log.exists());
    dir.unmount();

    let refused = cluster.cairn(&["mount", dir.text(), "-o", "ro,frobnicate"]);
    assert!(refused.code != 0 && refused.text().contains("frobnicate"), "{}", refused.text());

    // As mount(8) runs it for `cairn://quickstart DIR fuse.cairn rw,nosuid,nodev,_netdev 0 0`.
    let helper = cluster.beside("mount.fuse.cairn");
    std::os::unix::fs::symlink(process::binary(), &helper).expect("link");
    let words = ["cairn://quickstart", dir.text(), "-o", "rw,nosuid,nodev,_netdev"];
    process::run(cluster.command(&helper).args(words), STEP).must_succeed("mount.fuse.cairn");
    assert!(dir.line().starts_with("cairn://quickstart ") && dir.line().contains(" fuse.cairn rw,nosuid,nodev"));
    fs::write(dir.0.join("g"), b"through fstab").expect("write");

    process::signal(server_of(&dir.0), libc::SIGKILL);
    poll("the mount is dead", STEP, || {
        (fs::metadata(&dir.0).err()?.raw_os_error() == Some(libc::ENOTCONN)).then_some(())
    });
    cluster.cairn(&["mount", dir.text()]).must_succeed("mount over a dead one");
    assert_eq!(fs::read(dir.0.join("g")).expect("read"), b"through fstab");
    dir.unmount();
}
