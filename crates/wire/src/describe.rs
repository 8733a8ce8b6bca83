//! Frames in words, for traces.

use crate::cs::{CsError, CsReply, CsRequest};
use crate::data::{DataReply, DataRequest};
use crate::mds::{Call, MdsError, MdsReply, Push};
use crate::{Frame, FrameKind, decode};

/// Longer descriptions are cut.
const LENGTH_MAX: usize = 600;

/// What a frame says, on one line.
pub fn describe(frame: &Frame) -> String {
    let text = match frame.kind {
        FrameKind::Data => match DataRequest::decode(&frame.prefix, frame.payload.len()) {
            Ok(r) => format!(
                "{:?} {} {} {} {} #{} settled #{} blocks {}+{} flags {:x}",
                r.op,
                r.volume,
                r.chunk,
                r.version,
                r.epoch,
                r.sequence.0,
                r.settled.0,
                r.first_block,
                r.block_count,
                r.flags
            ),
            Err(error) => error.to_string(),
        },
        FrameKind::DataReply => match DataReply::decode(&frame.prefix, frame.payload.len()) {
            Ok(r) => {
                format!("{:?} ({}) {} durable #{} blocks {}", r.status, r.detail, r.epoch, r.durable.0, r.block_count)
            }
            Err(error) => error.to_string(),
        },
        FrameKind::CsCall => shown(decode::<CsRequest>("call", &frame.prefix)),
        FrameKind::CsReply => shown(decode::<Result<CsReply, CsError>>("reply", &frame.prefix)),
        FrameKind::MdsCall => shown(decode::<Call>("call", &frame.prefix)),
        FrameKind::MdsReply => shown(decode::<Result<MdsReply, MdsError>>("reply", &frame.prefix)),
        FrameKind::MdsPush => shown(decode::<Push>("push", &frame.prefix)),
        FrameKind::Auth | FrameKind::Raft | FrameKind::Image => format!("{} bytes", frame.prefix.len()),
    };
    let cut = text.char_indices().nth(LENGTH_MAX).map_or(text.len(), |(at, _)| at);
    format!("{:?} {}: {}", frame.kind, frame.id, &text[..cut])
}

fn shown<T: std::fmt::Debug, E: std::fmt::Display>(decoded: Result<T, E>) -> String {
    decoded.map_or_else(|error| error.to_string(), |value| format!("{value:?}"))
}
