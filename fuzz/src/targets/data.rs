//! The fixed layouts of the data path.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, seed, unsealed};
use cairn_wire::data::{DataReply, DataRequest};

pub const TARGET: Target = Target {
    name: "data",
    covers: "prefixes of data requests and answers, against payloads of any length",
    entry: "cairn_wire::data::{DataRequest, DataReply}::decode",
    shape: Shape::Bytes,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

/// Two bytes: blocks of payload (all ones: a length that is no whole number of them); then the prefix.
fn run(bytes: &[u8]) {
    let [low, high, prefix @ ..] = bytes else { return };
    let blocks = usize::from(u16::from_le_bytes([*low, *high]));
    let payload = if blocks == usize::from(u16::MAX) { 4097 } else { blocks * 4096 };
    if let Ok(request) = measured(prefix.len(), || DataRequest::decode(prefix, payload)) {
        let mut again = Vec::new();
        request.encode(&mut again);
        assert_eq!(again, prefix, "a request means its bytes");
    }
    if let Ok(reply) = measured(prefix.len(), || DataReply::decode(prefix, payload)) {
        let mut again = Vec::new();
        reply.encode(&mut again);
        assert_eq!(again, prefix, "an answer means its bytes");
    }
}

fn seeds() -> Seeds {
    let with = |blocks: u16, prefix: Vec<u8>| [blocks.to_le_bytes().to_vec(), prefix].concat();
    let mut seeds: Seeds = samples::data_requests()
        .into_iter()
        .map(|(name, request)| {
            let mut prefix = Vec::new();
            request.encode(&mut prefix);
            seed(name, with(request.checksums.len() as u16, prefix))
        })
        .collect();
    seeds.extend(samples::data_replies().into_iter().map(|(name, reply)| {
        let mut prefix = Vec::new();
        reply.encode(&mut prefix);
        seed(name, with(reply.checksums.len() as u16, prefix))
    }));
    seeds
}
