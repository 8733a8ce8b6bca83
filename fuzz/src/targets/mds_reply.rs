//! Answers of a metadata server.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::mds::{MdsError, MdsReply};

pub const TARGET: Target = Target {
    name: "mds_reply",
    covers: "every answer of the metadata servers, as clients and chunk servers read it",
    entry: "cairn_wire::decode::<Result<MdsReply, MdsError>>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<Result<MdsReply, MdsError>>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::replies())
}
