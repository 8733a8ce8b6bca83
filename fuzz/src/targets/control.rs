//! Control messages between members: every call, answer and push, one target each.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, unsealed};
use cairn_wire::cs::{CsError, CsReply, CsRequest};
use cairn_wire::mds::{Call, ImagePiece, MdsError, MdsReply, Push};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// Elements of lists take a few bytes on the wire and up to two hundred in memory.
const BOUND: Bound = Bound {
    base: 64 << 10,
    factor: 64,
    why: "numbers are short on the wire and have their full width in memory; only members of the cluster send these",
};

/// Decodes, and expects that what a message says survives another trip.
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    match measured(bytes.len(), || cairn_wire::decode::<T>("message", bytes)) {
        Ok(message) => {
            let again = cairn_wire::encode(&message);
            assert_eq!(
                cairn_wire::decode::<T>("message", &again).as_ref(),
                Ok(&message),
                "a message survives the trip"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

const fn message(
    name: &'static str,
    covers: &'static str,
    entry: &'static str,
    run: fn(&[u8]),
    seeds: fn() -> Seeds,
) -> Target {
    Target { name, covers, entry, shape: Shape::Bytes, bound: BOUND, run, seal: unsealed, seeds }
}

pub const MDS_CALL: Target =
    message("mds_call", "every call to the metadata servers", "cairn_wire::decode::<Call>", check::<Call>, || {
        samples::encoded(samples::calls())
    });

pub const MDS_REPLY: Target = message(
    "mds_reply",
    "every answer of the metadata servers, as clients and chunk servers read it",
    "cairn_wire::decode::<Result<MdsReply, MdsError>>",
    check::<Result<MdsReply, MdsError>>,
    || samples::encoded(samples::replies()),
);

pub const MDS_PUSH: Target =
    message("mds_push", "pushes of the metadata servers", "cairn_wire::decode::<Push>", check::<Push>, || {
        samples::encoded(samples::pushes())
    });

pub const IMAGE_PIECE: Target = message(
    "image_piece",
    "pieces of a state image between metadata servers",
    "cairn_wire::decode::<ImagePiece>",
    check::<ImagePiece>,
    || samples::encoded(samples::image_pieces()),
);

pub const CS_CALL: Target =
    message("cs_call", "rare calls to a chunk server", "cairn_wire::decode::<CsRequest>", check::<CsRequest>, || {
        samples::encoded(samples::cs_calls())
    });

pub const CS_REPLY: Target = message(
    "cs_reply",
    "answers to those calls, as clients and other chunk servers read them",
    "cairn_wire::decode::<Result<CsReply, CsError>>",
    check::<Result<CsReply, CsError>>,
    || samples::encoded(samples::cs_replies()),
);
