//! Linux's own NBD client, in a virtual machine: this machine's kernel may have none. `CAIRN_VMLAB` names a program
//! that boots one: `$CAIRN_VMLAB [--share DIR] -- COMMANDS` runs the commands as root in a guest whose 10.0.2.2 is this
//! machine's loopback, with DIR at /share, and exits with their status.

use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, Outcome};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Guests may be emulated: ten times slower than this machine.
const GUEST_LIMIT: Duration = Duration::from_secs(400);

fn guest(program: &Path, share: &Path, commands: &str) -> Outcome {
    let mut command = Command::new(program);
    command.arg("--share").arg(share).arg("--").arg(commands);
    process::run(&mut command, GUEST_LIMIT)
}

#[test]
fn linux_puts_a_file_system_on_an_export_and_finds_it_after_kills() {
    let Some(program) = std::env::var_os("CAIRN_VMLAB") else {
        eprintln!("skipped: CAIRN_VMLAB names no program that boots a virtual machine");
        return;
    };
    let program = Path::new(&program);
    let mut cluster = Cluster::start(Duration::from_secs(900));
    let share = cluster.beside("share");
    std::fs::create_dir(&share).expect("make a directory");
    let attach = |port: u16| format!("set -e; modprobe nbd; nbd-client 10.0.2.2 {port} /dev/nbd0 -N demo -C 2 >&2; ");
    let first = attach(cluster.nbd_port())
        + "mkfs.ext4 -q /dev/nbd0; mkdir -p /m; mount /dev/nbd0 /m; \
           mkdir /m/one; cp -a /usr/lib/python3* /m/one/; sync; touch /share/half; \
           while [ ! -e /share/killed ]; do cp -a /usr/bin /m/two; rm -rf /m/two; done; \
           cp -a /usr/bin /m/two; (cd /m; find . -type f -exec md5sum {} + | sort > /share/sums); \
           umount /m; nbd-client -d /dev/nbd0 >&2; wc -l < /share/sums";
    std::thread::scope(|scope| {
        let written = scope.spawn(|| guest(program, &share, &first).must_succeed("the first guest"));
        process::poll("the guest has written", GUEST_LIMIT, || share.join("half").exists().then_some(()));
        cluster.kill("cs2");
        std::fs::write(share.join("killed"), "").expect("write a file");
        let files: u32 = written.join().expect("the guest has ended").trim().parse().expect("a number of files");
        eprintln!("{files} files written by a kernel, a chunk server killed meanwhile");
        assert!(files > 100, "the guest wrote files");
    });
    cluster.kill_everything();
    cluster.start_again();
    let second = attach(cluster.nbd_port())
        + "e2fsck -fn /dev/nbd0 >&2; mkdir -p /m; mount -o ro /dev/nbd0 /m; cd /m; \
           find . -type f -exec md5sum {} + | sort | cmp - /share/sums; cd /; umount /m; nbd-client -d /dev/nbd0 >&2";
    guest(program, &share, &second).must_succeed("the second guest");
    cluster.stop();
}
