//! Pieces of a state image.

use super::control::{BOUND, check};
use crate::{Seeds, Shape, Target, samples, unsealed};
use cairn_wire::mds::ImagePiece;

pub const TARGET: Target = Target {
    name: "image_piece",
    covers: "pieces of a state image between metadata servers",
    entry: "cairn_wire::decode::<ImagePiece>",
    shape: Shape::Bytes,
    bound: BOUND,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    check::<ImagePiece>(bytes);
}

fn seeds() -> Seeds {
    samples::encoded(samples::image_pieces())
}
