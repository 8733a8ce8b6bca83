//! The handshake, each step with bytes of the other side's choice.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, script, seed, unsealed};
use cairn_types::{MdsId, NodeId};
use cairn_wire::auth::{AuthError, Responder};

pub const TARGET: Target = Target {
    name: "auth",
    covers: "all four frames of the handshake, on both sides; no proof made without the key may be taken",
    entry: "cairn_wire::auth::{Initiator, Responder}",
    shape: Shape::Script,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

fn answer(bytes: &[u8]) -> (Vec<u8>, Result<Responder, AuthError>) {
    let (key, cluster) = (samples::key(), samples::CLUSTER);
    Responder::answer(&key, "stor1", cluster, samples::at_present(NodeId::Mds(MdsId(1))), [2; 32], bytes)
}

/// Pieces by kind: hello, challenge, proof, verdict.
fn run(bytes: &[u8]) {
    let initiator = samples::initiator(Some(samples::CLUSTER));
    for (kind, piece) in script::pieces(bytes) {
        measured(piece.len(), || match kind & 3 {
            0 => drop(answer(piece)),
            1 => drop(initiator.challenged(piece)),
            2 => {
                let (_, responder) = answer(&initiator.hello());
                let (_, peer) = responder.expect("our own hello is good").judge(piece);
                assert!(peer.is_err() || piece == samples::proof(), "a proof that nobody with the key made");
            }
            _ => drop(initiator.judged(piece)),
        });
    }
}

fn seeds() -> Seeds {
    let initiator = samples::initiator(Some(samples::CLUSTER));
    let hello = initiator.hello();
    let (challenge, responder) = answer(&hello);
    let proof = samples::proof();
    let (verdict, _) = responder.expect("our own hello is good").judge(&proof);
    let (refusal, _) = answer(&samples::stranger().hello());
    let steps: [(u8, &[u8]); 5] = [(0, &hello), (1, &challenge), (2, &proof), (3, &verdict), (1, &refusal)];
    vec![
        seed("handshake", script::script(steps)),
        seed("hello", script::script([steps[0]])),
        seed("challenge", script::script([steps[1]])),
        seed("refusal", script::script([steps[4]])),
    ]
}
