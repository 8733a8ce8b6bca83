//! What the targets of control messages share.

use crate::Bound;
use crate::alloc::measured;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// Elements of lists take a few bytes on the wire and up to two hundred in memory.
pub const BOUND: Bound = Bound {
    base: 64 << 10,
    factor: 64,
    why: "numbers are short on the wire and have their full width in memory; only members of the cluster send these",
};

/// Decodes, and expects that what a message says survives another trip.
pub fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
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
