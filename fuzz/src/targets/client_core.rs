//! A client among servers that say anything.

use crate::driver::{DOWN, Driver, USE, WAIT, frame};
use crate::{Bound, Seeds, Shape, Target, samples, script, seed, unsealed};
use cairn_client::{ClientCore, CoreConfig, OnNoSpace, SizeRule, VolumeHandle};
use cairn_env::Buf;
use cairn_env::block::BlockOp;
use cairn_stdx::Rng;
use cairn_types::{Duration, HostId, VolumeId};
use cairn_wire::mds::{LeaseMode, MdsError, MdsReply, MdsRequest, SessionKind};
use cairn_wire::{Effects, FrameKind};
use std::cell::Cell;
use std::rc::Rc;

pub const TARGET: Target = Target {
    name: "client_core",
    covers: "a client's core: answers and pushes of metadata servers, answers of chunk servers, in any order, while its \
             user reads and writes",
    entry: "cairn_client::ClientCore::step",
    shape: Shape::Script,
    bound: Bound { base: 16 << 20, factor: 64, why: "what a client keeps: unsettled writes, maps, windows" },
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    let config = CoreConfig {
        mds: vec![samples::addr(7001)],
        host: HostId([1; 16]),
        host_name: "host1".into(),
        purpose: "test".into(),
        kind: SessionKind::Client,
        on_no_space: OnNoSpace::Wait,
        call_deadline: Duration::from_secs(60),
        open_deadline: Duration::from_secs(30),
    };
    let mut driver = Driver::new(ClientCore::new(config, Rng::new(1)), None);
    let handle: Rc<Cell<Option<VolumeHandle>>> = Rc::default();
    let blocks = Buf::zeroed(64 << 10);
    driver.play(bytes, |driver, piece| {
        act(driver, piece, &handle, &blocks);
        while let Some(done) = Some(driver.core.take_completions()).filter(|done| !done.is_empty()) {
            done.into_iter().for_each(|completion| completion.run());
        }
    });
    driver.core.take_completions().into_iter().for_each(|completion| completion.run());
    let _ = driver.core.explain();
}

/// What the user does: open, write, read, flush, discard, list extents, close, call.
fn act(driver: &mut Driver<ClientCore>, piece: &[u8], handle: &Rc<Cell<Option<VolumeHandle>>>, blocks: &Buf) {
    let (now, mut out) = (driver.now(), Effects::default());
    let byte = |at: usize| u64::from(piece.get(at).copied().unwrap_or(0));
    let (offset, len) = (byte(1) << 16 | byte(2) << 9, (byte(3) << 8 | 1).min(blocks.len() as u64));
    let core = &mut driver.core;
    let op = match byte(0) & 7 {
        0 => {
            let handle = handle.clone();
            let done = Box::new(move |opened: Result<VolumeHandle, _>| handle.set(opened.ok()));
            let rule = if byte(1) & 1 == 0 { SizeRule::File } else { SizeRule::Fixed };
            core.open(now, VolumeId(77), LeaseMode::Exclusive, rule, done, &mut out);
            return driver.carry_out(out);
        }
        1 => BlockOp::Write { offset, data: blocks.slice(0, len as usize), fua: byte(4) & 1 == 1 },
        2 => BlockOp::Read { offset, len: len as u32 },
        3 => BlockOp::Flush,
        4 => BlockOp::Discard { offset, len: len << 8 },
        5 => BlockOp::Extents { offset, len: len << 8 },
        6 => {
            if let Some(handle) = handle.take() {
                core.close(now, handle, Box::new(|| {}), &mut out);
            }
            return driver.carry_out(out);
        }
        _ => {
            core.call(now, MdsRequest::StatFs, Box::new(|_| {}), &mut out);
            return driver.carry_out(out);
        }
    };
    if let Some(handle) = handle.get() {
        core.submit(now, handle, op, Box::new(|_| {}), &mut out);
    }
    driver.carry_out(out);
}

/// Link 0 is that of the metadata servers, 1 and 2 those of chunk servers.
fn seeds() -> Seeds {
    let reply = |reply: &Result<MdsReply, MdsError>| frame(FrameKind::MdsReply, 0, &cairn_wire::encode(reply));
    let named = |name: &str| {
        let all = samples::replies();
        reply(&all.iter().find(|(known, _)| *known == name).expect("a sample").1)
    };
    let push = |index: usize| frame(FrameKind::MdsPush, 0, &cairn_wire::encode(&samples::pushes()[index].1));
    let cs =
        |link: u8, index: usize| frame(FrameKind::CsReply, link, &cairn_wire::encode(&samples::cs_replies()[index].1));
    let data = |link: u8, index: usize| {
        let mut prefix = Vec::new();
        samples::data_replies()[index].1.encode(&mut prefix);
        frame(FrameKind::DataReply, link, &prefix)
    };
    let wait = |ms: u16| (WAIT, ms.to_le_bytes().to_vec());
    let user = |what: &[u8]| (USE, what.to_vec());
    let begin = [
        wait(1),
        named("session"),
        user(&[0, 0]),
        named("topology"),
        reply(&Ok(MdsReply::Lease(samples::grant(true)))),
        named("topology"),
        wait(5),
        cs(1, 1),
        cs(2, 1),
        cs(1, 2),
        cs(2, 2),
        named("chunks"),
        user(&[9]),
    ];
    let with = |more: Vec<(u8, Vec<u8>)>| -> Vec<u8> {
        let all: Vec<(u8, Vec<u8>)> = begin.iter().cloned().chain(more).collect();
        script::script(all.iter().map(|(kind, piece)| (*kind, &piece[..])))
    };
    let written = vec![
        user(&[1, 0, 0, 32, 0]),
        named("chunks"),
        cs(1, 0),
        cs(2, 0),
        data(1, 0),
        data(2, 0),
        user(&[3]),
        data(1, 0),
        data(2, 0),
        wait(100),
        user(&[2, 0, 0, 32]),
        data(1, 1),
        data(2, 2),
        user(&[5, 0, 0, 255]),
        cs(1, 4),
        user(&[4, 0, 0, 255]),
        data(1, 0),
        data(2, 0),
        user(&[6]),
    ];
    let troubled = vec![
        user(&[1, 0, 0, 32, 0]),
        push(1),
        push(2),
        named("chunks"),
        data(1, 3),
        (DOWN, vec![1]),
        wait(3000),
        named("chunks"),
        push(0),
        cs(2, 5),
        named("session_ended"),
        wait(5000),
        named("session"),
    ];
    vec![
        seed("writes", with(written)),
        seed("trouble", with(troubled)),
        seed("opens", with(vec![user(&[7]), named("stat_fs")])),
    ]
}
