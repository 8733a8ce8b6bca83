//! Backups: the state at one index, handed out page by page while commands go on.
//!
//! The first request has the memtable moved into the durable image; from then on a reader of that image, which later
//! flushes do not move, gives the pages. One backup at a time, on the leader; it is volatile and simply begun again
//! when the leader changes.

use crate::base::{Base, ImageReader, Pairs};
use crate::core::MdsCore;
use cairn_types::{Duration, Instant};
use cairn_wire::Now;
use cairn_wire::mds::{MdsError, MdsReply};

/// Bytes of pairs in one page.
const PAGE_BYTES: usize = 256 << 10;
/// A backup nobody asked about for this long is given up.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// The backup under way.
struct Backup {
    token: u64,
    /// The image must stand here at least.
    wanted: u64,
    heard: Instant,
    reader: Option<Box<dyn ImageReader>>,
    /// The page given last, for a caller that lost the answer.
    last: Option<(u64, Pairs)>,
}

/// Backups under way: one at most.
#[derive(Default)]
pub(crate) struct Backups(Option<Backup>);

impl Backups {
    /// True while an image at `index` is too old for the backup that was asked for.
    pub fn wants_checkpoint(&self, index: u64) -> bool {
        self.0.as_ref().is_some_and(|backup| backup.reader.is_none() && index < backup.wanted)
    }

    /// Gives up a backup whose caller has gone.
    pub fn look(&mut self, now: Instant) {
        self.0.take_if(|backup| now > backup.heard + IDLE_MAX);
    }
}

impl<B: Base> MdsCore<B> {
    /// A page of the state. The first one, 0, begins; until the image is there the answer is not ready.
    pub(crate) fn state_page(&mut self, now: Now, token: u64, page: u64) -> Result<MdsReply, MdsError> {
        if !self.leading {
            return Err(self.not_leader());
        }
        match &mut self.backups.0 {
            Some(backup) if backup.token == token => backup.heard = now.mono,
            Some(_) => return Err(MdsError::Refused("another backup is under way; try again in a minute".to_owned())),
            None if page == 0 => {
                let wanted = self.applied;
                self.backups.0 = Some(Backup { token, wanted, heard: now.mono, reader: None, last: None });
            }
            None => {
                return Err(MdsError::Refused("the metadata servers have a new leader; begin the backup again".into()));
            }
        }
        let base = self.meta.kv().base();
        let backup = self.backups.0.as_mut().expect("begun above");
        if backup.reader.is_none() && base.mark().index >= backup.wanted {
            backup.reader = Some(base.reader());
        }
        let Some(reader) = &mut backup.reader else {
            return Ok(MdsReply::StatePage { index: 0, term: 0, pairs: Vec::new(), ready: false });
        };
        let mark = reader.mark();
        let known = backup.last.as_ref().filter(|(number, _)| *number == page).map(|(_, pairs)| pairs.clone());
        let next = backup.last.as_ref().map_or(0, |(number, _)| number + 1);
        let pairs = match known {
            Some(pairs) => pairs,
            None if page == next => {
                let pairs = reader.next_pairs(PAGE_BYTES).map_err(|error| match error.damaged {
                    true => crate::base::give_up(error),
                    false => MdsError::Refused(error.to_string()),
                })?;
                backup.last = Some((page, pairs.clone()));
                pairs
            }
            None => return Err(MdsError::Invalid(format!("page {next} is next, not {page}"))),
        };
        if pairs.is_empty() {
            self.backups.0 = None;
        }
        Ok(MdsReply::StatePage { index: mark.index, term: mark.term, pairs, ready: true })
    }
}
