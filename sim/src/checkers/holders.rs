//! I6: one holder at a time, by the simulator's clock, which no node has.
//!
//! From the moment a client has opened a volume under an epoch, nothing that is *asked* under an earlier one may be
//! answered with success: neither a write, which the replicas refuse, nor a read, which a holder that is cut off
//! answers by its own clock alone, and so only while its lease stands however that clock drifts. Whether the answer was
//! stale does not matter: that is what I3 looks for. What was asked before and is answered late is I5's.

use super::shadow::{Broken, Invariant};
use cairn_types::Epoch;
use std::collections::BTreeMap;

struct Newest {
    epoch: Epoch,
    client: usize,
    shared: bool,
    since: u64,
}

/// The newest epoch of each volume that somebody has opened.
#[derive(Default)]
pub struct Holders(BTreeMap<u64, Newest>);

fn broken(detail: String) -> Broken {
    Broken { invariant: Invariant::I6, detail }
}

impl Holders {
    /// A client was told that it has a volume open.
    ///
    /// # Errors
    /// I6 when another one has it under the same epoch, unless both only read.
    pub fn opened(&mut self, now: u64, volume: u64, client: usize, epoch: Epoch, shared: bool) -> Result<(), Broken> {
        match self.0.get_mut(&volume) {
            // It was granted before the newest one, and is told late: nothing it asks will be answered.
            Some(newest) if epoch < newest.epoch => Ok(()),
            Some(newest) if epoch == newest.epoch => {
                let other = newest.client;
                if other != client && !(shared && newest.shared) {
                    let what = format!("volume {volume}: clients {other} and {client} both hold it under {epoch}");
                    return Err(broken(what));
                }
                newest.shared &= shared;
                Ok(())
            }
            _ => {
                self.0.insert(volume, Newest { epoch, client, shared, since: now });
                Ok(())
            }
        }
    }

    /// Something that a client asked for at `asked` under `epoch` was answered with success.
    ///
    /// # Errors
    /// I6 when somebody had the volume under a later epoch by then.
    pub fn answered(&self, asked: u64, now: u64, volume: u64, client: usize, epoch: Epoch) -> Result<(), Broken> {
        let Some(newest) = self.0.get(&volume).filter(|newest| newest.epoch > epoch && newest.since < asked) else {
            return Ok(());
        };
        Err(broken(format!(
            "volume {volume}: what client {client} asked at {asked} under {epoch} was answered at {now}, though client {} \
             had it under {} since {}",
            newest.client, newest.epoch, newest.since
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_epoch_answers_nothing_that_is_asked_later() {
        let mut holders = Holders::default();
        holders.opened(10, 1, 0, Epoch(4), false).unwrap();
        holders.answered(11, 12, 1, 0, Epoch(4)).unwrap();
        holders.opened(20, 1, 1, Epoch(5), false).unwrap();
        holders.opened(21, 1, 0, Epoch(4), false).unwrap();
        holders.answered(19, 25, 1, 0, Epoch(4)).unwrap();
        holders.answered(22, 23, 2, 0, Epoch(4)).unwrap();
        assert_eq!(holders.answered(22, 23, 1, 0, Epoch(4)).unwrap_err().invariant, Invariant::I6);
    }

    #[test]
    fn only_readers_share_an_epoch() {
        let mut holders = Holders::default();
        holders.opened(10, 1, 0, Epoch(4), true).unwrap();
        holders.opened(10, 1, 1, Epoch(4), true).unwrap();
        holders.opened(10, 1, 1, Epoch(4), false).unwrap_err();
        holders.opened(10, 2, 1, Epoch(4), false).unwrap();
        holders.opened(10, 2, 1, Epoch(4), false).unwrap();
        holders.opened(10, 2, 2, Epoch(4), true).unwrap_err();
    }
}
