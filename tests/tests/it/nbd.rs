//! `cairn nbd serve` by hand: TLS with certificates, and a volume somebody else has.

use crate::needs;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, Outcome, poll};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// A port nobody listens on.
pub fn free_port() -> u16 {
    let held = TcpListener::bind("127.0.0.1:0").expect("bind");
    held.local_addr().expect("it is bound").port()
}

fn openssl(dir: &Path, words: &str) {
    let mut command = Command::new("openssl");
    command.args(words.split_whitespace()).current_dir(dir);
    process::run(&mut command, LIMIT).must_succeed(&format!("openssl {words}"));
}

/// An authority, a certificate of a server and one of a client signed by it, named as libnbd wants them.
fn make_certificates(dir: &Path) {
    std::fs::create_dir_all(dir).expect("make a directory");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(dir, &format!("req -x509 {key} -keyout ca-key.pem -out ca-cert.pem -days 2 -subj /CN=authority"));
    std::fs::write(dir.join("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").expect("write a file");
    for who in ["server", "client"] {
        openssl(dir, &format!("req {key} -keyout {who}-key.pem -out {who}.csr -subj /CN={who}"));
        openssl(
            dir,
            &format!(
                "x509 -req -in {who}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile names \
                 -out {who}-cert.pem"
            ),
        );
    }
}

/// Starts `nbd serve` of a volume by hand and waits until it listens.
fn serve(cluster: &mut Cluster, volume: &str, words: &[&str]) -> u16 {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let label = format!("nbd-{volume}");
    cluster.run_by_hand(&label, &[&["nbd", "serve", volume, "--listen", &listen], words].concat());
    poll("the NBD server listens", LIMIT, || std::net::TcpStream::connect(&listen).ok());
    port
}

#[test]
fn tls_is_spoken_with_certificates_and_nothing_is_served_without() {
    needs!("nbdcopy", "nbdinfo", "openssl");
    let mut cluster = Cluster::start(Duration::from_secs(200));
    let all = cluster.beside("pki");
    make_certificates(&all);
    // A client that knows the authority and has no certificate of its own.
    let anonymous = cluster.beside("anonymous");
    std::fs::create_dir(&anonymous).expect("make a directory");
    std::fs::copy(all.join("ca-cert.pem"), anonymous.join("ca-cert.pem")).expect("copy");
    let file = |name: &str| all.join(name).display().to_string();
    let (cert, key, ca) = (file("server-cert.pem"), file("server-key.pem"), file("ca-cert.pem"));
    for name in ["open", "closed"] {
        cluster.cairn(&["volume", "create", name, "1G"]).must_succeed("volume create");
    }
    let open = serve(&mut cluster, "open", &["--tls-cert", &cert, "--tls-key", &key, "--tls-required"]);
    let words = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca, "--tls-required"];
    let closed = serve(&mut cluster, "closed", &words);
    let uri = |port: u16, name: &str, certificates: &Path| {
        format!("nbds://localhost:{port}/{name}?tls-certificates={}", certificates.display())
    };
    let info = |uri: &str| -> Outcome { process::run(cluster.command("nbdinfo").args(["--size", uri]), LIMIT) };
    assert_eq!(info(&uri(open, "open", &anonymous)).must_succeed("nbdinfo").trim(), "1073741824");
    assert_ne!(info(&format!("nbd://localhost:{open}/open")).code, 0, "nothing is served in the clear");
    assert_ne!(info(&uri(closed, "closed", &anonymous)).code, 0, "a client without certificate is refused");
    assert_eq!(info(&uri(closed, "closed", &all)).must_succeed("nbdinfo").trim(), "1073741824");

    let image = cluster.beside("image");
    let bytes: Vec<u8> = (0u32..4 << 20).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(&image, &bytes).expect("write an image");
    let (image, target) = (image.display().to_string(), uri(closed, "closed", &all));
    cluster.tool("nbdcopy", &["--flush", &image, &target], LIMIT);
    let back = cluster.beside("back");
    cluster.tool("nbdcopy", &[&target, &back.display().to_string()], Duration::from_secs(120));
    let found = std::fs::read(&back).expect("read it back");
    assert!(found[..bytes.len()] == bytes[..], "what came back over TLS is what went in");
}

#[test]
fn a_volume_in_use_is_named_with_its_user_at_once() {
    let mut cluster = Cluster::start(Duration::from_secs(200));
    cluster.cairn(&["volume", "create", "busy", "1G"]).must_succeed("volume create");
    serve(&mut cluster, "busy", &[]);
    let listen = format!("127.0.0.1:{}", free_port());
    let begun = process::now();
    cluster.run_by_hand("second", &["nbd", "serve", "busy", "--listen", &listen]);
    let log = cluster.dir().join("log/second.log");
    let said = poll("the waiting server says for whom it waits", Duration::from_secs(10), || {
        std::fs::read_to_string(&log).ok().filter(|text| text.contains("waits"))
    });
    assert!(said.contains("nbd busy on"), "the user is named: {said}");
    eprintln!("said after {:.1} s", begun.elapsed().as_secs_f64());
    poll("it gives up and says what to do", Duration::from_secs(60), || {
        std::fs::read_to_string(&log).ok().filter(|text| text.contains("cairn revoke"))
    });
}
