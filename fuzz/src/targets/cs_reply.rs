//! Answers of a chunk server.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::cs::{CsError, CsReply};

pub const TARGET: Target = Target {
    name: "cs_reply",
    covers: "answers to those calls, as clients and other chunk servers read them",
    entry: "cairn_wire::decode::<Result<CsReply, CsError>>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<Result<CsReply, CsError>>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::cs_replies())
}
