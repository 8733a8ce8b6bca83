//! Stock clients: libnbd's tools, QEMU's tools, fio. A tool that is missing is named and skipped.

use crate::device::{Answers, MemDevice};
use crate::{Fixture, on_one_thread};
use cairn_nbd::{ServerConfig, Tls};
use std::path::Path;
use std::process::Stdio;
use tokio::process::Command;

const MIB: usize = 1 << 20;

/// True when `tool` can be run; says so when not.
fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file()));
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

/// Runs a command line, which must succeed; what it printed.
async fn run(line: &[&str]) -> String {
    let (succeeded, text) = attempt(line).await;
    assert!(succeeded, "{line:?} failed:\n{text}");
    text
}

async fn attempt(line: &[&str]) -> (bool, String) {
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An image with data, holes and an odd tail.
fn image() -> Vec<u8> {
    let mut image = vec![0; 24 * MIB + 512];
    for (i, byte) in image.iter_mut().enumerate() {
        let block = i / (64 << 10);
        if block % 3 != 1 {
            *byte = (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1;
        }
    }
    image
}

#[test]
fn nbdinfo_reads_description_sizes_and_map() {
    if !have("nbdinfo") {
        return;
    }
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(8 * MIB as u64)).await;
        let mut client = crate::client::Client::connect(&fixture.socket, "disk").await.unwrap();
        assert_eq!(client.write(0, MIB as u64, &vec![1; MIB]).await, 0);
        for uri in [fixture.unix_uri(), fixture.tcp_uri()] {
            let info = run(&["nbdinfo", &uri]).await;
            for line in [
                "protocol: newstyle-fixed without TLS, using structured packets",
                "export-size: 8388608",
                "description: a test disk",
                "can_multi_conn: true",
                "can_fast_zero: true",
                "can_df: true",
                "is_read_only: false",
                "base:allocation",
                "block_size_minimum: 1",
                "block_size_preferred: 4096",
                "block_size_maximum: 33554432",
            ] {
                assert!(info.contains(line), "`{line}` is missing in\n{info}");
            }
        }
        let map = run(&["nbdinfo", "--map", &fixture.unix_uri()]).await;
        let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0][..3], ["0", "1048576", "3"], "{map}");
        assert_eq!(rows[1][..3], ["1048576", "1048576", "0"], "{map}");
        assert_eq!(rows[2][..3], ["2097152", "6291456", "3"], "{map}");
        let list = run(&["nbdinfo", "--list", &format!("nbd://{}", fixture.tcp)]).await;
        assert!(list.contains("export=\"disk\"") && list.contains("a test disk"), "{list}");
        let (succeeded, text) = attempt(&["nbdinfo", &format!("nbd://{}/nothing", fixture.tcp)]).await;
        assert!(!succeeded && text.contains("No such file or directory"), "{text}");
    });
}

#[test]
fn nbdcopy_moves_an_image_in_and_out() {
    if !have("nbdcopy") {
        return;
    }
    for answers in [Answers::AtOnce, Answers::Later] {
        on_one_thread(async move {
            let image = image();
            let fixture = Fixture::start(MemDevice::new(image.len() as u64).answering(answers).without_log()).await;
            let (source, target) = (fixture.directory.path().join("in"), fixture.directory.path().join("out"));
            std::fs::write(&source, &image).unwrap();
            run(&["nbdcopy", "--flush", path(&source), &fixture.tcp_uri()]).await;
            assert!(fixture.device.data() == image);
            assert!(fixture.device.durable(0, image.len() as u64) == image, "--flush made it durable");
            run(&["nbdcopy", "--connections=4", &fixture.unix_uri(), path(&target)]).await;
            assert!(std::fs::read(&target).unwrap() == image);
        });
    }
}

#[test]
fn qemu_img_converts_in_and_out_and_maps() {
    if !have("qemu-img") {
        return;
    }
    on_one_thread(async {
        let image = image();
        let fixture = Fixture::start(MemDevice::new(image.len() as u64).without_log()).await;
        let (source, target) = (fixture.directory.path().join("in"), fixture.directory.path().join("out"));
        std::fs::write(&source, &image).unwrap();
        let uri = fixture.unix_uri();
        run(&["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", path(&source), &uri]).await;
        assert!(fixture.device.data() == image);
        run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", path(&source), &uri]).await;
        run(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &fixture.tcp_uri(), path(&target)]).await;
        assert!(std::fs::read(&target).unwrap() == image);
        let map = run(&["qemu-img", "map", "--output=json", "-f", "raw", &uri]).await;
        assert!(
            map.contains(
                r#""start": 65536, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false"#
            ),
            "{map}"
        );
    });
}

#[test]
fn qemu_io_uses_every_command() {
    if !have("qemu-io") {
        return;
    }
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(64 * MIB as u64)).await;
        let commands = [
            "write -P 1 0 1M",
            "write -P 2 1000 3000",
            "write -f -P 3 2M 32M",
            "flush",
            "read -P 1 0 1000",
            "read -P 2 1000 3000",
            "read -P 3 2M 32M",
            "write -z -u 4M 1M",
            "read -P 0 4M 1M",
            "write -z 8M 1M",
            "read -P 0 8M 1M",
            "write -z -u -n 10M 1M",
            "read -P 0 10M 1M",
            "discard 16M 8M",
            "map",
        ];
        let uri = fixture.unix_uri();
        let mut line = vec!["qemu-io", "-f", "raw", "-t", "writeback", "-d", "unmap", uri.as_str()];
        commands.iter().for_each(|command| line.extend(["-c", command]));
        let text = run(&line).await;
        assert!(!text.to_lowercase().contains("error") && !text.contains("verification failed"), "{text}");
        let log = fixture.device.take_log();
        let has = |what: &str| assert!(log.iter().any(|entry| entry.starts_with(what)), "no {what} in {log:#?}");
        has("write 1000+3000 fua=false");
        has("write 2097152+33554432 fua=true");
        has("Flush");
        has("WriteZeroes { offset: 4194304, len: 1048576");
        has("write 8388608+1048576");
        has("WriteZeroes { offset: 10485760, len: 1048576");
        has("Discard { offset: 16777216, len: 8388608 }");
        has("Extents");
        assert_eq!(fixture.device.durable(2 * MIB as u64, 4), [3; 4]);
    });
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    if !have("fio") {
        return;
    }
    on_one_thread(async {
        if !run(&["fio", "--enghelp"]).await.contains("nbd") {
            return println!("skipped: fio is built without the nbd engine");
        }
        let fixture = Fixture::start(MemDevice::new(32 * MIB as u64).without_log()).await;
        let uri = format!("--uri={}", fixture.unix_uri());
        let directory = format!("--aux-path={}", fixture.directory.path().display());
        let job = ["fio", "--name=v", "--ioengine=nbd", "--rw=randrw", "--iodepth=64", "--size=32m", "--verify=crc32c"];
        let more = ["--bsrange=512-128k", "--bs_unaligned=0", "--verify_fatal=1", "--randseed=7", "--fsync=64"];
        run(&[&job[..], &more[..], &[uri.as_str(), directory.as_str()]].concat()).await;
    });
}

/// A certificate authority, a server certificate for 127.0.0.1 and localhost, and a client certificate.
async fn certificates(directory: &Path) {
    let file = |name: &str| path(&directory.join(name)).to_owned();
    let new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let days = ["-days", "2"];
    let (authority, authority_key) = (file("ca-cert.pem"), file("ca-key.pem"));
    let line = ["-subj", "/CN=cairn test", "-keyout", &authority_key, "-out", &authority];
    run(&[&new[..], &days, &line].concat()).await;
    for (role, names) in [("server", "DNS:localhost,IP:127.0.0.1"), ("client", "DNS:client")] {
        let (certificate, key) = (file(&format!("{role}-cert.pem")), file(&format!("{role}-key.pem")));
        let names = format!("subjectAltName={names}");
        let signed = ["-CA", &authority, "-CAkey", &authority_key, "-addext", &names, "-addext"];
        let rest = ["basicConstraints=CA:FALSE", "-subj", "/CN=localhost", "-keyout", &key, "-out", &certificate];
        run(&[&new[..], &days, &signed, &rest].concat()).await;
    }
}

async fn with_tls(required: bool, client_certificates: bool) -> (Fixture, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path()).await;
    let file = |name: &str| directory.path().join(name);
    let authority = file("ca-cert.pem");
    let client = client_certificates.then_some(authority.as_path());
    let tls = Tls::load(&file("server-cert.pem"), &file("server-key.pem"), client, required).unwrap();
    let adjust = |config: &mut ServerConfig| config.tls = Some(tls);
    let fixture = Fixture::start_with(MemDevice::new(image().len() as u64).without_log(), adjust).await;
    (fixture, directory)
}

#[test]
fn libnbd_copies_over_tls_and_is_refused_without() {
    if !have("nbdcopy") || !have("nbdinfo") || !have("openssl") {
        return;
    }
    on_one_thread(async {
        let (fixture, certificates) = with_tls(true, true).await;
        let image = image();
        let (source, target) = (fixture.directory.path().join("in"), fixture.directory.path().join("out"));
        std::fs::write(&source, &image).unwrap();
        let port = fixture.tcp.port();
        let uri = format!("nbds://localhost:{port}/disk?tls-certificates={}", certificates.path().display());
        let info = run(&["nbdinfo", &uri]).await;
        assert!(info.contains("protocol: newstyle-fixed with TLS, using structured packets"), "{info}");
        run(&["nbdcopy", "--flush", path(&source), &uri]).await;
        assert!(fixture.device.durable(0, image.len() as u64) == image);
        run(&["nbdcopy", &uri, path(&target)]).await;
        assert!(std::fs::read(&target).unwrap() == image);
        let (succeeded, text) = attempt(&["nbdinfo", &fixture.tcp_uri()]).await;
        assert!(!succeeded && text.to_lowercase().contains("tls"), "{text}");
    });
}

#[test]
fn qemu_img_converts_over_tls_and_without_where_that_is_allowed() {
    if !have("qemu-img") || !have("openssl") {
        return;
    }
    on_one_thread(async {
        let (fixture, certificates) = with_tls(false, false).await;
        let image = image();
        let source = fixture.directory.path().join("in");
        std::fs::write(&source, &image).unwrap();
        let object =
            format!("tls-creds-x509,id=t,endpoint=client,verify-peer=on,dir={}", certificates.path().display());
        let target = format!(
            "driver=nbd,host=localhost,port={},export=disk,tls-creds=t,tls-hostname=localhost",
            fixture.tcp.port()
        );
        let convert = ["qemu-img", "convert", "--object", &object, "-n", "--target-image-opts", "-f", "raw"];
        run(&[&convert[..], &[path(&source), &target]].concat()).await;
        assert!(fixture.device.data() == image);
        run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", path(&source), &fixture.tcp_uri()]).await;
        let notices = fixture.notices.borrow().join("\n");
        assert!(notices.contains("uses export `disk` over TLS"), "{notices}");
    });
}

/// `cargo test --release -p cairn-nbd -- --ignored --nocapture bench`: operations a second over a unix socket, the
/// device being memory that answers from another task; server and fio share the machine's cores.
#[test]
#[ignore = "a measurement"]
fn bench() {
    if !have("fio") {
        return;
    }
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(256 * MIB as u64).without_log()).await;
        for uri in [fixture.unix_uri(), fixture.tcp_uri()] {
            for (rw, bs, depth) in [
                ("randread", "4k", 1),
                ("randread", "4k", 64),
                ("randwrite", "4k", 64),
                ("read", "1m", 8),
                ("write", "1m", 8),
            ] {
                let (uri, rw, bs) = (format!("--uri={uri}"), format!("--rw={rw}"), format!("--bs={bs}"));
                let depth = format!("--iodepth={depth}");
                let job =
                    ["fio", "--name=b", "--ioengine=nbd", "--size=256m", "--time_based", "--runtime=3", "--thread"];
                let text = run(&[&job[..], &[uri.as_str(), &rw, &bs, &depth]].concat()).await;
                let figures = text.lines().filter(|line| line.contains("IOPS=")).map(str::trim).collect::<Vec<_>>();
                println!("{uri} {rw} {bs} {depth}: {}", figures.join(" "));
            }
        }
    });
}
