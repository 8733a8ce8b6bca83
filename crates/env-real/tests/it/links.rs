//! Links: handshakes good and bad, frames of every size, peers that misbehave.

use crate::support::{CLIENT, CLUSTER, Echo, Host, Raw, SERVER, identity, key, run};
use cairn_env::Buf;
use cairn_env_real::{Identity, ReactorOptions, Stopped};
use cairn_types::ClusterId;
use cairn_wire::frame::{FRAME_HEADER_SIZE, FrameKind, write_frame_head};
use cairn_wire::{LinkId, NetEffect};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

fn pattern(len: usize, seed: u64) -> Buf {
    let mut bytes = vec![0; len];
    cairn_stdx::Rng::new(seed).fill(&mut bytes);
    Buf::copy_from(&bytes)
}

#[test]
fn frames_of_every_size_come_back_whole_and_in_order() {
    frames_of_every_size(|| Host::server(ReactorOptions::default()));
    frames_of_every_size(Host::far_server);
}

fn frames_of_every_size(server: impl FnOnce() -> Host) {
    run(async {
        let (server, client) = (server(), Host::client(identity(CLIENT)));
        let link = client.link(server.addr).await;
        let sizes = [1, 100, 4096, 5000, 32 << 10, 65_536, 100_000, 1 << 20, 4 << 20, 3, 4096];
        let payloads: Vec<Buf> = sizes.iter().enumerate().map(|(i, size)| pattern(*size, i as u64)).collect();
        for (id, payload) in payloads.iter().enumerate() {
            client.send(link, FrameKind::Data, id as u64, b"E", vec![payload.clone()]);
        }
        let control = pattern(16 << 20, 99);
        client.send(link, FrameKind::MdsCall, 99, &control, Vec::new());
        let frames = client.until(|echo| (echo.frames.len() == 12).then(|| std::mem::take(&mut echo.frames))).await;
        for (id, ((from, frame), sent)) in frames.iter().zip(&payloads).enumerate() {
            assert_eq!((*from, frame.id), (link, id as u64));
            assert!(frame.payload == *sent && frame.payload.is_aligned());
        }
        assert!(frames[11].1.prefix == control[..]);
        let ups = server.reactor.with(|echo, _, _| echo.ups.clone());
        assert_eq!((ups.len(), ups[0].1), (1, CLIENT));
        assert!(ups[0].0.is_accepted() && !link.is_accepted());
        assert_eq!(server.reactor.stats().frames_in, 12);
    });
}

#[test]
fn many_links_at_once_keep_to_themselves() {
    many_links(|| Host::server(ReactorOptions::default()));
    many_links(Host::far_server);
}

fn many_links(server: impl FnOnce() -> Host) {
    run(async {
        let server = server();
        let clients: Vec<Host> = (0..20).map(|_| Host::client(identity(CLIENT))).collect();
        for client in &clients {
            let link = client.link(server.addr).await;
            for id in 0..100 {
                client.send(link, FrameKind::Data, id, b"E", vec![pattern(1000 + id as usize * 97, id)]);
            }
        }
        for client in &clients {
            let frames =
                client.until(|echo| (echo.frames.len() == 100).then(|| std::mem::take(&mut echo.frames))).await;
            for (id, (_, frame)) in frames.iter().enumerate() {
                assert!(frame.id == id as u64 && frame.payload == pattern(1000 + id * 97, id as u64));
            }
        }
    });
}

async fn refused(server: Identity, client: Identity) -> String {
    let server = Host::start(server, ReactorOptions::default(), Vec::new(), Echo::default());
    let client = Host::client(client);
    let link = client.connect(server.addr);
    let reason = client.down(link).await;
    server.reactor.with(|echo, _, _| assert!(echo.ups.is_empty() && echo.downs.is_empty()));
    client.reactor.with(|echo, _, _| assert!(echo.ups.is_empty()));
    reason
}

#[test]
fn a_peer_with_another_key_name_or_cluster_is_refused_and_told_why() {
    run(async {
        let wrong_key = Identity { key: key("other"), ..identity(CLIENT) };
        let reason = refused(identity(SERVER), wrong_key).await;
        assert!(reason.contains("password"), "{reason}");
        let wrong_name = Identity { cluster_name: "stor2".to_owned(), ..identity(CLIENT) };
        let reason = refused(identity(SERVER), wrong_name).await;
        assert!(reason.contains("belongs to cluster `stor1`"), "{reason}");
        let wrong_cluster = Identity { cluster: Some(ClusterId([8; 16])), ..identity(CLIENT) };
        let reason = refused(identity(SERVER), wrong_cluster).await;
        assert!(reason.contains("made anew"), "{reason}");
        let homeless = Identity { cluster: None, ..identity(SERVER) };
        let reason = refused(homeless, identity(CLIENT)).await;
        assert!(reason.contains("has not joined"), "{reason}");
    });
}

#[test]
fn the_cluster_is_learnt_from_the_first_proven_peer_and_held_to() {
    run(async {
        let server = Host::server(ReactorOptions::default());
        let client = Host::client(Identity { cluster: None, ..identity(CLIENT) });
        assert_eq!(client.reactor.cluster(), None);
        client.link(server.addr).await;
        assert_eq!(client.reactor.cluster(), Some(CLUSTER));
        server.reactor.set_cluster(ClusterId([9; 16]));
        let second = client.connect(server.addr);
        let reason = client.down(second).await;
        assert!(reason.contains("made anew"), "{reason}");
    });
}

#[test]
fn a_frame_right_behind_the_handshake_is_not_lost() {
    run(async {
        let greeting = Echo { is_server: true, greeting: Some(vec![5; 20_000]), ..Echo::default() };
        let server = Host::start(identity(SERVER), ReactorOptions::default(), Vec::new(), greeting);
        for _ in 0..20 {
            let client = Host::client(identity(CLIENT));
            let link = client.link(server.addr).await;
            let frame = client.until(|echo| echo.frames.pop()).await;
            assert_eq!((frame.0, frame.1.kind, frame.1.prefix.len()), (link, FrameKind::MdsPush, 20_000));
        }
    });
}

#[test]
fn garbage_closes_the_link_before_and_after_the_handshake() {
    run(async {
        let server = Host::server(ReactorOptions::default());
        let mut raw = Raw::connect(server.addr).await;
        raw.stream.write_all(&[b'G'; 200]).await.unwrap();
        raw.closed().await;
        server.until(|_| (!server.log.borrow().is_empty()).then_some(())).await;
        assert!(server.log.borrow()[0].contains("does not speak Cairn's protocol"), "{:?}", server.log.borrow());

        let mut raw = Raw::connect(server.addr).await;
        raw.send(FrameKind::MdsCall, 1, b"let me in").await;
        raw.closed().await;

        let mut raw = Raw::link(server.addr).await;
        raw.stream.write_all(&[b'G'; 200]).await.unwrap();
        raw.closed().await;
        let (link, reason) = server.until(|echo| echo.downs.pop()).await;
        assert!(link.is_accepted() && reason.contains("does not speak"), "{reason}");

        let mut raw = Raw::link(server.addr).await;
        raw.send(FrameKind::Auth, 0, b"again").await;
        raw.closed().await;
        let (_, reason) = server.until(|echo| echo.downs.pop()).await;
        assert!(reason.contains("after the handshake"), "{reason}");
    });
}

#[test]
fn a_frame_over_the_limit_closes_the_link() {
    run(async {
        let server = Host::server(ReactorOptions::default());
        for (at, field) in [(16, "prefix_len"), (20, "payload_len")] {
            let mut raw = Raw::link(server.addr).await;
            let mut header = Vec::new();
            write_frame_head(&mut header, FrameKind::Data, 1, b"", 0);
            header[at..at + 4].copy_from_slice(&(100u32 << 20).to_le_bytes());
            let crc = cairn_stdx::checksum::crc32c(&header[4..FRAME_HEADER_SIZE]);
            header[..4].copy_from_slice(&crc.to_le_bytes());
            raw.stream.write_all(&header).await.unwrap();
            raw.closed().await;
            let (_, reason) = server.until(|echo| echo.downs.pop()).await;
            assert!(reason.contains(field), "{reason}");
        }
    });
}

#[test]
fn silent_peers_cannot_keep_others_out() {
    run(async {
        let options = ReactorOptions {
            unauthenticated_max: 2,
            handshake_deadline: Duration::from_millis(300),
            ..ReactorOptions::default()
        };
        let server = Host::server(options);
        let mut silent = [Raw::connect(server.addr).await, Raw::connect(server.addr).await];
        silent[1].stream.write_all(&[0x17]).await.unwrap();
        let mut third = Raw::connect(server.addr).await;
        third.closed().await;
        for raw in &mut silent {
            raw.closed().await;
        }
        assert!(server.log.borrow().iter().any(|line| line.contains("too many peers")), "{:?}", server.log.borrow());
        Host::client(identity(CLIENT)).link(server.addr).await;
        assert!(server.log.borrow().iter().filter(|line| line.contains("took longer")).count() == 2);
    });
}

#[test]
fn a_half_closed_link_is_down() {
    run(async {
        let server = Host::server(ReactorOptions::default());
        let mut raw = Raw::link(server.addr).await;
        raw.send(FrameKind::MdsCall, 4, b"still answered").await;
        assert_eq!(raw.frame().await.unwrap().id, 4);
        raw.stream.shutdown().await.unwrap();
        let (_, reason) = server.until(|echo| echo.downs.pop()).await;
        assert!(reason.contains("closed the link"), "{reason}");
        raw.closed().await;
    });
}

#[test]
fn a_peer_that_does_not_read_is_cut_off_and_one_that_reads_late_gets_everything() {
    run(async {
        let server = Host::server(ReactorOptions { output_max: 20 << 20, ..ReactorOptions::default() });
        let client = Host::client(identity(CLIENT));
        let mut late = Raw::link(server.addr).await;
        let mut bytes = Vec::new();
        let payload = pattern(150_000, 1);
        write_frame_head(&mut bytes, FrameKind::Data, 8, b"M\x64", payload.len());
        bytes.extend_from_slice(&payload);
        late.stream.write_all(&bytes).await.unwrap();
        // The other link's answer shows that the server goes on while the socket of the first is full.
        let link = client.link(server.addr).await;
        client.send(link, FrameKind::MdsCall, 1, b"hello", Vec::new());
        client.until(|echo| echo.frames.pop()).await;
        for _ in 0..100 {
            let frame = late.frame().await.unwrap();
            assert!(frame.id == 8 && frame.payload == payload);
        }
        late.stream.write_all(&bytes).await.unwrap();
        late.stream.write_all(&bytes).await.unwrap();
        let (_, reason) = server.until(|echo| echo.downs.pop()).await;
        assert!(reason.contains("does not read"), "{reason}");
    });
}

#[test]
fn a_link_that_cannot_be_made_is_down_and_a_closed_one_is_silent() {
    run(async {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = Host::server(ReactorOptions::default());
        let client = Host::client(identity(CLIENT));
        let link = client.connect(nobody);
        let reason = client.down(link).await;
        assert!(reason.starts_with("connect: "), "{reason}");
        // Sent before the link is up, and closed before it is up: both leave no trace.
        let early = client.connect(server.addr);
        client.reactor.with(|_, _, out| {
            out.send(early, FrameKind::MdsCall, 1, vec![1]);
            out.net.push(NetEffect::Close { link: early });
        });
        let link = client.link(server.addr).await;
        client.send(link, FrameKind::MdsCall, 2, b"last words", Vec::new());
        client.reactor.with(|_, _, out| out.net.push(NetEffect::Close { link }));
        let (_, reason) = server.until(|echo| echo.downs.pop()).await;
        assert!(reason.contains("closed") || reason.contains("reset"), "{reason}");
        client.reactor.with(|echo, _, out| {
            assert_eq!((echo.ups.len(), echo.downs.len()), (1, 1));
            out.send(LinkId(77), FrameKind::MdsCall, 2, vec![1]);
        });
    });
}

#[test]
fn timers_fire_no_earlier_than_asked_and_the_earliest_wins() {
    run(async {
        let host = Host::client(identity(CLIENT));
        let at = host.reactor.with(|echo, now, out| {
            assert_eq!(echo.starts, 1, "the process has started");
            out.wake_at(now.mono + Duration::from_secs(3600));
            out.wake_at(now.mono + Duration::from_millis(20));
            now.mono + Duration::from_millis(20)
        });
        let now = host.until(|echo| echo.timers.pop()).await;
        assert!(now.mono >= at && now.wall_ns > 1_700_000_000_000_000_000);
        host.reactor.with(|_, now, out| out.wake_at(now.mono));
        host.until(|echo| echo.timers.pop()).await;
    });
}

#[test]
fn stopping_closes_links_and_a_fatal_process_stops() {
    run(async {
        let (server, client) = (Host::server(ReactorOptions::default()), Host::client(identity(CLIENT)));
        let link = client.link(server.addr).await;
        client.send(link, FrameKind::Data, 1, b"F", Vec::new());
        assert_eq!(server.reactor.stopped().await, Stopped::Fatal("told to".to_owned()));
        client.down(link).await;
        let again = client.connect(server.addr);
        client.down(again).await;
        client.reactor.stop();
        client.reactor.stop();
        assert_eq!(client.reactor.stopped().await, Stopped::Asked);
        let turns = client.reactor.with(|echo, _, _| echo.turns);
        tokio::task::yield_now().await;
        assert_eq!(client.reactor.with(|echo, _, _| echo.turns), turns, "nothing is stepped any more");
    });
}

#[test]
fn spinning_serves_like_sleeping() {
    run(async {
        let server = Host::server(ReactorOptions { spin_us: 200, ..ReactorOptions::default() });
        let client = Host::client(identity(CLIENT));
        let link = client.link(server.addr).await;
        for id in 0..200 {
            client.send(link, FrameKind::Data, id, b"E", vec![pattern(4096, id)]);
            let (_, frame) = client.until(|echo| echo.frames.pop()).await;
            assert!(frame.id == id && frame.payload == pattern(4096, id));
        }
    });
}
