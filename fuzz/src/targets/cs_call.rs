//! Calls to a chunk server.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::cs::CsRequest;

pub const TARGET: Target = Target {
    name: "cs_call",
    covers: "rare calls to a chunk server",
    entry: "cairn_wire::decode::<CsRequest>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<CsRequest>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::cs_calls())
}
