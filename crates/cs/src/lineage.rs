//! Which of all states of a store this is: what the store keeps of it in its label.
//!
//! Each start of a server has a nonce. It is drawn and durable before the metadata servers hear of it (*pending*), and
//! becomes the nonce of the store when they have acknowledged it and that is durable too (*acknowledged*). Between the
//! two the server serves nothing, so whatever was copied of the store then is equal to it. What is found by this and
//! what is not: `docs/design/chunk-server.md`.

use cairn_store::LABEL_BYTES;
use cairn_wire::mds;

/// The label of a chunk server's store. Layout: `docs/formats/store.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lineage {
    /// Starts acknowledged so far.
    generation: u64,
    /// Nonce of the last of them; zero before the first.
    acknowledged: u64,
    /// Nonce of the start under way; zero when it is acknowledged.
    pending: u64,
    /// The highest log sequence number the store held when the pending nonce was drawn.
    recovered: u64,
}

impl Lineage {
    pub(crate) fn decode(label: &[u8; LABEL_BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(label[8 * at..8 * at + 8].try_into().expect("eight bytes"));
        Self { generation: word(0), acknowledged: word(1), pending: word(2), recovered: word(3) }
    }

    pub(crate) fn encode(&self) -> [u8; LABEL_BYTES] {
        let mut label = [0; LABEL_BYTES];
        let words = [self.generation, self.acknowledged, self.pending, self.recovered];
        for (bytes, word) in label.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        label
    }

    /// A start begins. True when the label changed and must be durable before anybody hears of it.
    ///
    /// A pending nonce is kept: nothing was served under it, and the metadata servers may know it already.
    pub(crate) fn begin(&mut self, nonce: u64, recovered: u64) -> bool {
        let is_new = self.pending == 0;
        if is_new {
            (self.pending, self.recovered) = (nonce, recovered);
        }
        is_new
    }

    /// True when the metadata servers have acknowledged this start.
    pub(crate) fn is_acknowledged(&self) -> bool {
        self.pending == 0
    }

    /// The label once this start is acknowledged.
    pub(crate) fn acknowledge(&self) -> Self {
        Self { generation: self.generation + 1, acknowledged: self.pending, pending: 0, recovered: self.recovered }
    }

    /// What is told at registration.
    pub(crate) fn told(&self, boot: u64) -> mds::Lineage {
        let (generation, nonce) = match self.pending {
            0 => (self.generation, self.acknowledged),
            pending => (self.generation + 1, pending),
        };
        mds::Lineage { generation, previous: self.acknowledged, nonce, boot, recovered: self.recovered }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_pending_until_acknowledged_and_the_label_keeps_it() {
        let mut lineage = Lineage::decode(&[0; LABEL_BYTES]);
        assert!(lineage.begin(7, 100));
        let mut again = Lineage::decode(&lineage.encode());
        assert_eq!(again, lineage);
        // A second attempt of the same start keeps nonce and mark.
        assert!(!again.begin(8, 101));
        let told = again.told(5);
        assert_eq!((told.generation, told.previous, told.nonce, told.recovered), (1, 0, 7, 100));
        let done = again.acknowledge();
        assert!(done.is_acknowledged());
        let told = done.told(5);
        assert_eq!((told.generation, told.previous, told.nonce), (1, 7, 7));
        let mut next = Lineage::decode(&done.encode());
        assert!(next.begin(9, 140));
        let told = next.told(6);
        assert_eq!((told.generation, told.previous, told.nonce, told.recovered), (2, 7, 9, 140));
    }
}
