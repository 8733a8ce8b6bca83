//! The log of events: numbered without gaps, bounded, the oldest go first.

use crate::command::MetaEffect;
use crate::keys;
use crate::kv::Kv;
use crate::state::{Meta, decode_record};
use cairn_wire::mds::{ClusterEvent, LIST_MAX, MdsReply, Severity};

impl<K: Kv> Meta<K> {
    /// Adds an event; to be called through [`Meta::event`].
    pub(crate) fn log_event(&mut self, severity: Severity, code: &str, text: String) {
        let number = self.globals.last_event + 1;
        let event = ClusterEvent { number, wall_ns: self.globals.wall_ns, severity, code: code.to_owned(), text };
        self.globals.last_event = number;
        self.put_record(&keys::one(keys::EVENT, number), &event);
        // Two at a time, so that a lowered limit is reached in the end.
        for _ in 0..2 {
            if number - self.globals.first_event >= self.config("mds.events.kept") {
                self.delete(&keys::one(keys::EVENT, self.globals.first_event));
                self.globals.first_event += 1;
            }
        }
        self.effect(MetaEffect::Event(event));
    }

    pub(crate) fn events(&self, after: u64, limit: u32) -> MdsReply {
        let limit = (limit as usize).clamp(1, LIST_MAX);
        let events = self.kv.scan(&keys::one(keys::EVENT, after.saturating_add(1)), &[keys::EVENT + 1], limit);
        MdsReply::Events(events.iter().map(|(_, value)| decode_record(value)).collect())
    }
}
