//! Disks behind a whole reactor: socket to disk to socket.

use crate::support::{CLIENT, Echo, Host, SERVER, identity, run};
use cairn_env::{Buf, DiskErrorKind, DiskOp, DiskRequest, IoId};
use cairn_env_real::{Disk, DiskOptions, ReactorOptions};
use cairn_wire::DiskIndex;
use cairn_wire::frame::FrameKind;

const SIZE: u64 = 16 << 20;

fn open(path: &std::path::Path) -> Disk {
    Disk::open_file(path, DiskOptions { create_size: Some(SIZE), ..DiskOptions::default() }).unwrap()
}

fn ask(host: &Host, disk: u8, io: u64, op: DiskOp) {
    host.reactor.with(|_, _, out| out.disk.push((DiskIndex(disk), DiskRequest { io: IoId(io), op })));
}

async fn answer(host: &Host) -> Result<Buf, DiskErrorKind> {
    host.until(|echo| echo.disk.pop()).await.result.map_err(|error| error.kind)
}

#[test]
fn a_write_travels_from_the_socket_to_the_disk_and_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    run(async {
        let echo = Echo { is_server: true, ..Echo::default() };
        let server = Host::start(identity(SERVER), ReactorOptions::default(), vec![open(&path)], echo);
        let client = Host::client(identity(CLIENT));
        let link = client.link(server.addr).await;
        for id in 0..256 {
            client.send(link, FrameKind::Data, id, b"D", vec![Buf::copy_from(&[id as u8; 4096])]);
        }
        let replies = client.until(|echo| (echo.frames.len() == 256).then(|| std::mem::take(&mut echo.frames))).await;
        assert!(replies.iter().all(|(_, frame)| frame.prefix == [1]));
        let stats = server.reactor.stats();
        assert_eq!((stats.disk_requests, stats.disk_completions), (256, 256));
        assert!(stats.turns < 1000, "requests are served in batches: {stats:?}");
        ask(&server, 0, 1000, DiskOp::Flush);
        ask(&server, 0, 1001, DiskOp::Read { offset: 0, len: 256 * 4096 });
        server.until(|echo| (echo.disk.len() == 258).then_some(())).await;
        let read = server.reactor.with(|echo, _, _| echo.disk.iter().find(|done| done.io == IoId(1001)).cloned());
        let read = read.unwrap().result.unwrap();
        assert!(read.chunks(4096).enumerate().all(|(id, block)| block.iter().all(|byte| *byte == id as u8)));
    });
}

#[test]
fn disks_can_be_added_to_a_running_process_and_discards_do_not_block_it() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let host = Host::client(identity(CLIENT));
        assert_eq!(host.reactor.add_disk(open(&dir.path().join("a"))).unwrap(), DiskIndex(0));
        assert_eq!(host.reactor.add_disk(open(&dir.path().join("b"))).unwrap(), DiskIndex(1));
        for disk in 0..2 {
            let bufs = vec![Buf::copy_from(&[disk + 1; 8192])];
            ask(&host, disk, 1, DiskOp::Write { offset: 8192, bufs });
            answer(&host).await.unwrap();
        }
        for disk in 0..2 {
            ask(&host, disk, 2, DiskOp::Read { offset: 8192, len: 8192 });
            assert!(answer(&host).await.unwrap().iter().all(|byte| *byte == disk + 1));
        }
        ask(&host, 0, 3, DiskOp::Discard { offset: 8192, len: 4096 });
        assert_eq!(answer(&host).await.unwrap().len(), 0);
        ask(&host, 0, 4, DiskOp::Read { offset: 8192, len: 8192 });
        assert!(answer(&host).await.unwrap()[4096..].iter().all(|byte| *byte == 1), "what was not discarded is there");
        ask(&host, 1, 5, DiskOp::Read { offset: SIZE, len: 4096 });
        assert_eq!(answer(&host).await, Err(DiskErrorKind::Io));
        host.until(|_| host.log.borrow().iter().any(|line| line.contains("beyond the end")).then_some(())).await;
    });
}

#[test]
fn a_disk_is_free_again_when_its_reactor_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for round in 0..3u8 {
        run(async {
            let host = Host::start(identity(CLIENT), ReactorOptions::default(), vec![open(&path)], Echo::default());
            ask(&host, 0, 1, DiskOp::Read { offset: 0, len: 4096 });
            assert_eq!(answer(&host).await.unwrap()[0], round);
            ask(&host, 0, 2, DiskOp::Write { offset: 0, bufs: vec![Buf::copy_from(&[round + 1; 4096])] });
            answer(&host).await.unwrap();
            host.reactor.stop();
        });
    }
}
