//! What the server does between socket and device.

use crate::client::{Client, DISC, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES};
use crate::device::{Answers, MemDevice};
use crate::{Fixture, on_one_thread};
use cairn_nbd::{ExportOptions, Gate, InsertError};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

/// Lets every other task run until it waits for something.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..20_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never came: {what}");
}

#[test]
fn data_written_is_read_back_whatever_the_size_and_the_moment_of_the_answer() {
    for answers in [Answers::AtOnce, Answers::Later] {
        on_one_thread(async move {
            let fixture = Fixture::start(MemDevice::new(64 * MIB).answering(answers)).await;
            let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
            assert_eq!(client.size, 64 * MIB);
            for (offset, size) in [(0u64, 1usize), (511, 4096), (8192, 4096), (12345, 300_000), (MIB, 32 << 20)] {
                let data: Vec<u8> = (0..size).map(|i| (i * 7 + size) as u8).collect();
                assert_eq!(client.write(0, offset, &data).await, 0);
                assert!(client.read(offset, size as u32).await == data, "{size} bytes at {offset}");
            }
        });
    }
}

/// A lost volume is replaced: who was connected is answered and goes, who comes waits for the new one.
#[test]
fn a_replaced_device_ends_its_connections_and_new_ones_wait_for_the_next() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let mut old = Client::connect(&fixture.socket, "disk").await.unwrap();
        assert_eq!(old.write(0, 0, &[1; 4096]).await, 0);
        let gate = Rc::new(Gate::new(MIB, false));
        let drained = fixture.exports.replace("disk", gate.clone()).expect("it is exported");
        drained.wait().await;
        let mut new = Client::connect(&fixture.socket, "disk").await.unwrap();
        assert_eq!(new.size, MIB);
        let next = Rc::new(MemDevice::new(2 * MIB));
        let waits = tokio::time::timeout(Duration::from_millis(50), new.write(0, 0, &[2; 4096])).await;
        assert!(waits.is_err(), "nothing answers before the device is there");
        assert_eq!(fixture.device.data()[..4096], [1; 4096], "the old device gets nothing more");
        gate.open(next.clone());
        until("the write reaches the next device", || next.data()[..4096] == [2; 4096]).await;
        let last = Client::connect(&fixture.socket, "disk").await.unwrap();
        assert_eq!(last.size, 2 * MIB);

        let refused = Rc::new(Gate::new(MIB, false));
        fixture.exports.replace("disk", refused.clone()).expect("it is exported");
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        refused.fail();
        assert_eq!(client.write(0, 0, &[3; 4096]).await, 5, "EIO");
        assert!(fixture.exports.replace("other", refused).is_none());
    });
}

#[test]
fn many_requests_in_one_send_are_all_answered() {
    for answers in [Answers::AtOnce, Answers::Later] {
        on_one_thread(async move {
            let fixture = Fixture::start(MemDevice::new(4 * MIB).answering(answers)).await;
            let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
            let mut batch = Vec::new();
            for i in 0..900u64 {
                batch.extend(Client::request(WRITE, 0, i, i * 4096, 4096));
                batch.extend(vec![i as u8; 4096]);
            }
            let (mut reading, mut writing) = client.stream.split();
            let send = async { writing.write_all(&batch).await.unwrap() };
            let receive = async {
                let mut cookies = Vec::new();
                for _ in 0..900 {
                    assert_eq!(reading.read_u64().await.unwrap(), 0x6744_6698_0000_0000);
                    cookies.push(reading.read_u64().await.unwrap());
                }
                cookies
            };
            let ((), mut cookies) = tokio::join!(send, receive);
            cookies.sort_unstable();
            assert!(cookies.into_iter().eq(0..900));
            let data = fixture.device.data();
            assert!((0..900).all(|i| data[i * 4096..(i + 1) * 4096].iter().all(|&byte| byte == i as u8)));
        });
    }
}

#[test]
fn forced_unit_access_and_flush_reach_the_device_on_every_connection() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let device = &fixture.device;
        let mut one = Client::connect(&fixture.socket, "disk").await.unwrap();
        let mut two = Client::connect(&fixture.socket, "disk").await.unwrap();
        assert_ne!(one.flags & (1 << 8), 0, "multi-conn is offered");
        assert_eq!(one.write(0, 0, b"plain").await, 0);
        assert_eq!(device.durable(0, 5), [0; 5]);
        assert_eq!(one.write(FUA, 4096, b"forced").await, 0);
        assert_eq!(device.durable(4096, 6), b"forced");
        assert_eq!(two.call(FLUSH, 0, 0, 0).await, 0);
        assert_eq!(device.durable(0, 5), b"plain", "a flush covers what another connection wrote");

        assert_eq!(one.call(WRITE_ZEROES, FUA, 0, 4096).await, 0);
        assert_eq!(device.durable(0, 5), [0; 5]);
        assert_eq!(one.call(TRIM, FUA, 4096, 4096).await, 0);
        assert_eq!(device.durable(4096, 6), [0; 6]);
        device.take_log();
        assert_eq!(one.call(TRIM, 0, 4096, 4096).await, 0);
        assert_eq!(device.take_log(), ["Discard { offset: 4096, len: 4096 }"]);
    });
}

#[test]
fn zeros_that_must_occupy_space_are_written() {
    for answers in [Answers::AtOnce, Answers::Later] {
        on_one_thread(async move {
            let fixture = Fixture::start(MemDevice::new(16 * MIB).answering(answers)).await;
            let device = &fixture.device;
            let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
            assert_eq!(client.call(WRITE_ZEROES, NO_HOLE | FAST_ZERO, 0, 4096).await, 95);
            assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO, 0, 4096).await, 0);
            device.take_log();
            let len = (9 * MIB) as u32 + 10;
            assert_eq!(client.call(WRITE_ZEROES, NO_HOLE | FUA, MIB - 10, len).await, 0);
            let log = device.take_log();
            assert_eq!(log[0], format!("write {}+10 fua=false", MIB - 10));
            assert_eq!(log[1], format!("write {MIB}+{MIB} fua=false"));
            assert_eq!((log.len(), log[10].as_str()), (11, "Flush"));
        });
    }
}

#[test]
fn a_read_only_export_refuses_writes() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let options = ExportOptions { read_only: true, ..ExportOptions::default() };
        fixture.exports.insert("view", fixture.device.clone(), options).unwrap();
        let mut client = Client::connect(&fixture.socket, "view").await.unwrap();
        assert_ne!(client.flags & 2, 0);
        assert_eq!(client.write(0, 0, b"no").await, 1);
        assert_eq!(client.call(TRIM, 0, 0, 4096).await, 1);
        assert_eq!(client.read(0, 2).await, [0, 0]);
        assert_eq!(client.call(FLUSH, 0, 0, 0).await, 0);
    });
}

#[test]
fn a_reply_waits_for_the_device_and_only_so_much_is_read_meanwhile() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let device = &fixture.device;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        let batch: Vec<u8> = (0..1000).flat_map(|cookie| Client::request(READ, 0, cookie, 0, 16)).collect();
        client.send(&batch).await;
        until("256 requests under way", || device.held_count() == 256).await;
        settle().await;
        assert_eq!(device.held_count(), 256);
        let mut byte = [0];
        let early = tokio::time::timeout(Duration::ZERO, client.stream.read(&mut byte)).await;
        assert!(early.is_err(), "no reply before the device answers");
        for _ in 0..1000 {
            until("the next request", || device.held_count() > 0).await;
            assert!(device.release());
        }
        for cookie in 0..1000 {
            assert_eq!(client.reply().await.unwrap(), (0, cookie));
            client.stream.read_exact(&mut [0; 16]).await.unwrap();
        }
    });
}

#[test]
fn a_write_is_answered_only_after_the_device_answered() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&[Client::request(WRITE, 0, 3, 0, 4), b"data".to_vec()].concat()).await;
        until("the write", || fixture.device.held_count() == 1).await;
        settle().await;
        let early = client.stream.try_read(&mut [0]);
        assert_eq!(early.unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "no reply before the device answers");
        fixture.device.release();
        assert_eq!(client.reply().await.unwrap(), (0, 3));
    });
}

#[test]
fn a_client_that_does_not_read_its_replies_is_not_read_from_either() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(8 * MIB).without_log()).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        let mut other = Client::connect(&fixture.socket, "disk").await.unwrap();
        let batch: Vec<u8> = (0..100).flat_map(|cookie| Client::request(READ, 0, cookie, 0, 8 << 20)).collect();
        client.send(&batch).await;
        settle().await;
        assert_eq!(other.write(0, 0, b"others are served").await, 0);
        let mut data = vec![0; 8 << 20];
        for cookie in 0..100 {
            assert_eq!(client.reply().await.unwrap(), (0, cookie));
            client.stream.read_exact(&mut data).await.unwrap();
        }
    });
}

#[test]
fn a_client_that_leaves_has_its_requests_finished_first() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&Client::request(READ, 0, 1, 0, 1)).await;
        client.send(&Client::request(DISC, 0, 2, 0, 0)).await;
        until("the request", || fixture.device.held_count() == 1).await;
        settle().await;
        assert_eq!(fixture.exports.connection_count("disk"), Some(1));
        fixture.device.release();
        assert_eq!(client.reply().await.unwrap(), (0, 1));
        client.stream.read_exact(&mut [0]).await.unwrap();
        assert!(client.is_closed().await);
        until("the end", || fixture.server.connection_count() == 0).await;
        assert!(fixture.notices.borrow().last().unwrap().ends_with("on export `disk`: the client left"));
    });
}

#[test]
fn a_client_that_vanishes_amid_a_payload_leaves_nothing_behind() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&Client::request(WRITE, 0, 1, 0, 100_000)).await;
        client.send(&[1; 50_000]).await;
        settle().await;
        drop(client);
        until("the end", || fixture.server.connection_count() == 0).await;
        assert!(fixture.device.take_log().is_empty(), "half a write is no write");
    });
}

#[test]
fn broken_protocol_ends_the_connection_with_a_line_in_the_log() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&[0xff; 64]).await;
        assert!(client.is_closed().await);
        assert!(Client::connect(&fixture.socket, "no such disk").await.is_err());
        until("both ends", || fixture.server.connection_count() == 0).await;
        let notices = fixture.notices.borrow().join("\n");
        assert!(notices.contains("protocol error: a request starts with 0xffffffff"), "{notices}");
        assert!(notices.contains("protocol error: there is no export named `no such disk`"), "{notices}");
    });
}

#[test]
fn the_number_of_connections_is_bounded() {
    on_one_thread(async {
        let fixture = Fixture::start_with(MemDevice::new(MIB), |config| config.connections_max = 2).await;
        let one = Client::connect(&fixture.socket, "disk").await.unwrap();
        let _two = Client::connect(&fixture.socket, "disk").await.unwrap();
        assert!(Client::greet(&fixture.socket).await.is_err());
        drop(one);
        until("room", || fixture.server.connection_count() == 1).await;
        assert!(Client::connect(&fixture.socket, "disk").await.is_ok());
    });
}

#[test]
fn a_client_that_never_chooses_an_export_is_disconnected() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let mut stream = Client::greet(&fixture.socket).await.unwrap();
        let mut chosen = Client::connect(&fixture.socket, "disk").await.unwrap();
        let before = tokio::time::Instant::now();
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        assert!(before.elapsed() >= Duration::from_secs(29));
        assert_eq!(chosen.read(0, 1).await, [0], "who has chosen may idle for ever");
    });
}

#[test]
fn exports_come_and_go() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let (exports, device) = (&fixture.exports, &fixture.device);
        let taken = exports.insert("disk", device.clone(), ExportOptions::default());
        assert_eq!(taken, Err(InsertError::Taken { name: "disk".into() }));
        exports.insert("more", Rc::new(MemDevice::new(4096)), ExportOptions::default()).unwrap();
        assert_eq!(exports.names(), ["disk", "more"]);

        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        let mut more = Client::connect(&fixture.socket, "more").await.unwrap();
        client.send(&Client::request(READ, 0, 5, 0, 1)).await;
        until("the request", || device.held_count() == 1).await;
        let drained = exports.remove("disk").unwrap();
        assert!(exports.remove("disk").is_none());
        settle().await;
        assert!(Client::connect(&fixture.socket, "disk").await.is_err());
        device.release();
        drained.wait().await;
        assert_eq!(client.reply().await.unwrap(), (0, 5));
        client.stream.read_exact(&mut [0]).await.unwrap();
        assert!(client.is_closed().await);
        assert_eq!(Rc::strong_count(device), 1, "nothing holds the device any more");
        assert_eq!(more.read(0, 1).await, [0]);
    });
}

#[test]
fn a_new_size_is_seen_by_the_next_connection_and_holds_for_all() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        fixture.device.resize(2 * MIB);
        assert_eq!(Client::connect(&fixture.socket, "disk").await.unwrap().size, 2 * MIB);
        assert_eq!(client.write(0, MIB, b"beyond").await, 0);
        fixture.device.resize(MIB);
        assert_eq!(client.write(0, MIB, b"beyond").await, 28);
    });
}

#[test]
fn shutdown_answers_what_is_under_way_and_cuts_off_what_never_ends() {
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let device = &fixture.device;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        let mut idle = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&Client::request(READ, 0, 5, 0, 1)).await;
        until("the request", || device.held_count() == 1).await;
        let server = fixture.server.clone();
        let shutdown = tokio::task::spawn_local(async move { server.shutdown(Duration::from_secs(60)).await });
        assert!(idle.is_closed().await);
        assert!(!shutdown.is_finished());
        device.release();
        shutdown.await.unwrap();
        assert_eq!(client.reply().await.unwrap(), (0, 5));
        assert!(Client::greet(&fixture.socket).await.is_err(), "nobody listens");
    });
    on_one_thread(async {
        let fixture = Fixture::start(MemDevice::new(MIB).answering(Answers::WhenReleased)).await;
        let mut client = Client::connect(&fixture.socket, "disk").await.unwrap();
        client.send(&Client::request(READ, 0, 5, 0, 1)).await;
        until("the request", || fixture.device.held_count() == 1).await;
        fixture.server.shutdown(Duration::from_millis(10)).await;
        assert!(client.is_closed().await);
        assert!(fixture.device.release(), "a late answer does no harm");
        assert!(fixture.notices.borrow().last().unwrap().ends_with("cut off with requests under way"));
    });
}

/// Each planted bug makes the test that guards its rule fail.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_seen() {
    let guards: [(&'static str, fn()); 3] = [
        ("nbd_ack_before_done", a_write_is_answered_only_after_the_device_answered),
        ("nbd_flush_not_forwarded", forced_unit_access_and_flush_reach_the_device_on_every_connection),
        ("nbd_trim_fua_without_flush", forced_unit_access_and_flush_reach_the_device_on_every_connection),
    ];
    for (name, guard) in guards {
        cairn_stdx::planted::activate(Some(name));
        assert!(std::panic::catch_unwind(guard).is_err(), "{name} is not seen");
        cairn_stdx::planted::activate(None);
    }
}
