//! Which state of a chunk server's store the cluster last knew: an older or a second copy is turned away (I3, I7).
//!
//! Versions of chunks cannot tell: they change with replica sets, not with writes. So each start of a server names the
//! start before it, and what the store held is compared with what it once said was durable. What is found by this and
//! what is not: `docs/design/chunk-server.md`.

use crate::command::Answer;
use crate::keys;
use crate::kv::Kv;
use crate::state::Meta;
use cairn_stdx::planted;
use cairn_types::CsId;
use cairn_wire::mds::{Lineage, MdsError, MdsReply, Severity};
use serde::{Deserialize, Serialize};

/// What is known of the last start of a server that was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// Its number.
    generation: u64,
    /// Its nonce.
    nonce: u64,
    /// Drawn by its process.
    boot: u64,
    /// The store has made durable that it was let in, so it may have served: nobody else can still be of this start.
    confirmed: bool,
    /// The highest log sequence number that the store said is durable.
    durable: u64,
    /// Another copy was turned away since, and reported.
    reported: bool,
}

impl Known {
    /// The record once `told` is let in; else what speaks against it.
    fn next(&self, told: &Lineage) -> Result<Self, String> {
        let known = Self {
            generation: told.generation,
            nonce: told.nonce,
            boot: told.boot,
            confirmed: told.previous == told.nonce,
            durable: self.durable.max(told.recovered),
            reported: false,
        };
        if told.nonce == self.nonce {
            // The same start again: the answer was lost, the link broke, or its process died before it served.
            let same = !self.confirmed || told.boot == self.boot;
            let known = Self { confirmed: known.confirmed || self.confirmed, ..known };
            return same.then_some(known).ok_or_else(|| {
                "another process was let in with the same start of this store, and has served since: two copies of the \
                 directory were started"
                    .to_owned()
            });
        }
        if told.previous != self.nonce || told.previous == told.nonce {
            return Err(match told.generation > self.generation + 1 {
                true => format!(
                    "the cluster knows start {} of this store as the last, and this would be start {}: the metadata are \
                     older than the chunk server",
                    self.generation, told.generation
                ),
                false => format!(
                    "the cluster has known this store since at start {}, which this directory knows nothing of: it is an \
                     older or a second copy",
                    self.generation
                ),
            });
        }
        if told.recovered < self.durable && !planted!("old_copy_judged_by_starts_only") {
            return Err(format!(
                "the store told of {} durable groups of its log and now has {}: it is an older copy of the directory, or \
                 its disk lost what it had confirmed",
                self.durable, told.recovered
            ));
        }
        Ok(known)
    }
}

impl<K: Kv> Meta<K> {
    fn lineage(&self, cs: CsId) -> Option<Known> {
        self.record(&keys::server(keys::LINEAGE, cs))
    }

    /// Judges a registration. `Ok(None)`: let in; `Ok(Some(_))`: the answer that turns it away.
    pub(crate) fn judge_lineage(&mut self, cs: CsId, told: Option<&Lineage>) -> Result<Option<MdsReply>, MdsError> {
        let known = self.lineage(cs);
        let told = match (told, known) {
            (Some(told), _) => told,
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return Err(MdsError::Refused(format!(
                    "{cs} has been run by a newer program, which told where its store stands; run that one"
                )));
            }
        };
        let first = Known {
            generation: told.generation,
            nonce: told.nonce,
            boot: told.boot,
            confirmed: told.previous == told.nonce,
            durable: told.recovered,
            reported: false,
        };
        match known.map_or(Ok(first), |known| known.next(told)) {
            Ok(next) => {
                if known != Some(next) {
                    self.put_record(&keys::server(keys::LINEAGE, cs), &next);
                }
                Ok(None)
            }
            Err(why) => Ok(Some(self.turn_away(cs, &why))),
        }
    }

    fn turn_away(&mut self, cs: CsId, why: &str) -> MdsReply {
        let reason = format!(
            "{cs} is turned away and serves nothing: {why}. What it holds may be out of date and is not used. Start the \
             directory that ran last; if that one is lost, remove the server with `cairn rm-cs -f {}` and make an empty \
             one: its chunks are copied from the others",
            cs.0
        );
        if let Some(known) = self.lineage(cs).filter(|known| !known.reported) {
            let known = Known { reported: true, ..known };
            self.put_record(&keys::server(keys::LINEAGE, cs), &known);
            self.event(Severity::Error, "MDS-4004", reason.clone());
        }
        MdsReply::CsTurnedAway { reason }
    }

    /// A server begins anew with an empty store: a process that still runs with the old one is turned away, in silence.
    pub(crate) fn forget_starts(&mut self, cs: CsId) {
        let none = Known { generation: 0, nonce: 0, boot: 0, confirmed: true, durable: 0, reported: true };
        self.put_record(&keys::server(keys::LINEAGE, cs), &none);
    }

    /// True when a process is of the start of its server that was let in last.
    pub fn is_of_last_start(&self, cs: CsId, boot: u64) -> bool {
        self.lineage(cs).is_none_or(|known| known.boot == boot)
    }

    /// The answer to a process whose server was started from another copy of its directory meanwhile.
    pub(crate) fn judge_start(&mut self, cs: CsId, boot: u64) -> Option<MdsReply> {
        let overtaken = !self.is_of_last_start(cs, boot);
        overtaken.then(|| self.turn_away(cs, "another process was let in with a copy of this store"))
    }

    /// Notes how much of a store's log is durable.
    pub(crate) fn cs_mark(&mut self, cs: CsId, boot: u64, durable: u64) -> Answer {
        if let Some(answer) = self.judge_start(cs, boot) {
            return Ok(answer);
        }
        if let Some(known) = self.lineage(cs).filter(|known| known.durable < durable) {
            self.put_record(&keys::server(keys::LINEAGE, cs), &Known { durable, ..known });
        }
        Ok(MdsReply::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(generation: u64, previous: u64, nonce: u64, boot: u64, recovered: u64) -> Lineage {
        Lineage { generation, previous, nonce, boot, recovered }
    }

    /// A server at its third start (nonce 30, process 3), which has told of 500 durable groups.
    fn known() -> Known {
        Known { generation: 3, nonce: 30, boot: 3, confirmed: true, durable: 500, reported: false }
    }

    #[test]
    fn whatever_a_crash_leaves_is_let_in() {
        // The next start, with all that was durable.
        let next = known().next(&told(4, 30, 40, 4, 500)).unwrap();
        assert!(!next.confirmed);
        // Its answer was lost; its process died before or after the label was written; a delayed call of the first.
        let again = next.next(&told(4, 30, 40, 4, 500)).unwrap();
        let other_process = again.next(&told(4, 30, 40, 5, 500)).unwrap();
        let delayed = other_process.next(&told(4, 30, 40, 4, 500)).unwrap();
        let confirmed = delayed.next(&told(4, 40, 40, 5, 500)).unwrap();
        assert!(confirmed.confirmed && confirmed.boot == 5);
        // The same process over a new link, and a delayed call of its own.
        assert_eq!(confirmed.next(&told(4, 40, 40, 5, 500)), Ok(confirmed));
        assert_eq!(confirmed.next(&told(4, 30, 40, 5, 500)), Ok(confirmed));
        // Acknowledged and died before it said so.
        assert!(again.next(&told(5, 40, 50, 6, 501)).is_ok());
    }

    #[test]
    fn whatever_is_an_older_or_a_second_copy_is_not() {
        // From before the last start, whether it was acknowledged there or under way.
        assert!(known().next(&told(3, 20, 31, 9, 600)).is_err());
        assert!(known().next(&told(3, 20, 30, 9, 600)).is_err());
        // Of the last start, with less than was durable.
        assert!(known().next(&told(4, 30, 40, 9, 499)).is_err());
        // A second process that goes on as if it were the one let in.
        assert!(known().next(&told(3, 30, 30, 9, 600)).is_err());
        // The copy was let in first: the process that ran is the second.
        let copy = known().next(&told(4, 30, 41, 9, 500)).unwrap();
        assert!(copy.next(&told(3, 30, 30, 3, 600)).is_err());
        assert!(copy.next(&told(4, 30, 42, 10, 600)).is_err());
        // The metadata are the older ones.
        let error = known().next(&told(9, 80, 90, 9, 900)).unwrap_err();
        assert!(error.contains("metadata are older"), "{error}");
    }
}
