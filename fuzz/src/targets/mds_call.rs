//! Calls to a metadata server.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::mds::Call;

pub const TARGET: Target = Target {
    name: "mds_call",
    covers: "every call to the metadata servers",
    entry: "cairn_wire::decode::<Call>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<Call>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::calls())
}
