//! Unasked news from a metadata server.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::mds::Push;

pub const TARGET: Target = Target {
    name: "mds_push",
    covers: "pushes of the metadata servers",
    entry: "cairn_wire::decode::<Push>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<Push>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::pushes())
}
