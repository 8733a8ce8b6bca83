//! I21: all metadata servers are lost for good, and the production recovery makes the metadata anew from what the chunk
//! servers hold, with a backup of some earlier moment or without. A new cluster starts on that, and the usual verdict
//! is given on it: whatever was acknowledged must be read.
//!
//! It happens after the faults, before redundancy is full again: there are copies under way, copies of older versions,
//! and writes that nobody has settled.

use super::cluster::{CLUSTER_NAME, Cluster, Recovered};
use super::{Scenario, Verdict, broken};
use crate::checkers::shadow::{Broken, Invariant};
use crate::world::{NodeIndex, SECOND};
use cairn_cs::CsCore;
use cairn_mds::Base;
use cairn_mds::disaster::TERM_MARGIN;
use cairn_meta::recover::{Listing, Options, recover};
use cairn_meta::{BaseKv, MemKv, Pairs};
use cairn_wire::mds::MdsRequest;

/// Seeds in which it happens. No draw decides it, so that all that comes before stays what it was.
pub(crate) const SEEDS_DISASTER_OF: u64 = 19;
pub(crate) const SEEDS_DISASTER: [u64; 2] = [12, 18];

/// True when all metadata servers are lost in this seed.
pub(super) fn is_disaster(seed: u64) -> bool {
    SEEDS_DISASTER.contains(&(seed % SEEDS_DISASTER_OF))
}

/// Virtual time a recovered cluster gets to come up.
const COMES_UP_WITHIN: u64 = 120 * SECOND;

/// What a disaster leaves behind for the verdict.
#[derive(Default)]
pub(super) struct Disaster {
    /// The state of some moment before, and its term.
    backup: Option<(u64, Pairs)>,
    /// All metadata servers were lost.
    pub happened: bool,
}

impl Scenario {
    pub(super) fn has_disaster(&self) -> bool {
        self.fsx.is_none() && is_disaster(self.seed)
    }

    /// Half of the disasters find a backup: the image of the leader amid the faults, which is what a backup reads.
    pub(super) fn back_metadata_up(&mut self) {
        if !self.has_disaster() || (self.seed / SEEDS_DISASTER_OF).is_multiple_of(2) {
            return;
        }
        let Some(leader) = self.leader() else { return };
        self.disaster.backup = self.cluster.image_of(leader);
        let what = if self.disaster.backup.is_some() { "are backed up" } else { "have no image yet" };
        self.cluster.world.note(format_args!("the metadata {what}"));
    }

    /// See the module.
    pub(super) fn lose_all_metadata(&mut self) -> Verdict {
        if !self.has_disaster() {
            return Ok(());
        }
        // What is wrong already has another name.
        self.shadow.check().map_err(Box::new)?;
        self.learn_sets();
        self.cluster.world.note(format_args!("every metadata server is lost"));
        for client in 0..self.cluster.clients.len() {
            let node = self.cluster.clients[client];
            if self.cluster.is_running(node) {
                self.cluster.world.kill(node);
                self.client_died(client)?;
            }
        }
        self.cluster.lose_operator();
        let listings = self.cluster.stop_and_list().map_err(|why| broken(Invariant::I21, why))?;
        let (term, backup) = self.disaster.backup.take().unwrap_or_default();
        let backup = (!backup.is_empty()).then(|| backup.into_iter().collect::<MemKv>());
        let options = Options {
            name: CLUSTER_NAME.to_owned(),
            addr: self.cluster.next_mds_addr(),
            repository: String::new(),
            redundancy: None,
            block_volumes: Default::default(),
            all_block_volumes: true,
            wall_ns: 0,
        };
        let (state, report) = recover(&options, &listings, backup)
            .map_err(|error| broken(Invariant::I21, format!("recover: {error}")))?;
        for line in report.to_string().lines() {
            self.cluster.world.note(format_args!("recovered: {line}"));
        }
        let term = term + TERM_MARGIN;
        self.cluster.start_recovered(&Recovered { report: &report, term, state: &state });
        self.digests.clear();
        self.disaster.happened = true;
        let up = |s: &mut Self| {
            let nodes: Vec<_> = s.cluster.cs.iter().filter(|cs| !cs.retired).map(|cs| cs.node).collect();
            let admitted = |node| s.cluster.world.inspect::<CsCore, _>(node, |core| core.is_admitted()) == Some(true);
            nodes.into_iter().all(admitted) && s.leader().is_some()
        };
        self.wait("chunk servers register with the recovered metadata", COMES_UP_WITHIN, up)
    }

    /// The operator has looked at the data: what the metadata do not know may go.
    pub(super) fn confirm_recovery(&mut self, client: usize) -> Verdict {
        if !self.disaster.happened {
            return Ok(());
        }
        let pairs = vec![("mds.recovery.hold".to_owned(), "0".to_owned())];
        self.call_through(client, MdsRequest::ConfigSet { pairs }).map(|_| ())
    }

    /// What is missing after a disaster was not found.
    pub(super) fn as_found(&self, broken: Box<Broken>) -> Box<Broken> {
        if !self.disaster.happened {
            return broken;
        }
        let detail = format!("after every metadata server was lost, {:?}: {}", broken.invariant, broken.detail);
        Box::new(Broken { invariant: Invariant::I21, detail })
    }
}

impl Cluster {
    /// The durable image of a metadata server, and the term it stands at; none while it is empty.
    fn image_of(&self, node: NodeIndex) -> Option<(u64, Pairs)> {
        let base = self.mds.iter().find(|mds| mds.node == node)?.image();
        let (mark, pairs) = (base.mark(), base.scan(&[0], &[u8::MAX], usize::MAX));
        (mark.index > 0).then_some((mark.term, pairs))
    }

    /// Stops everything and lists what the chunk servers hold.
    fn stop_and_list(&mut self) -> Result<Vec<Listing>, String> {
        for index in 0..self.mds.len() {
            self.world.power_cut(self.mds[index].node);
            self.mds[index].retired = true;
        }
        let mut listings = Vec::new();
        for index in 0..self.cs.len() {
            self.world.kill(self.cs[index].node);
            if !self.cs[index].retired {
                listings.push(self.list(index)?);
            }
        }
        Ok(listings)
    }
}
