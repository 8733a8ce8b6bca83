//! Bringing a cluster up the way operators do: the first metadata server creates it, the others are admitted and join,
//! chunk servers register, volumes are created.

use super::cluster::SimMds;
use super::load::{Kind, Pending};
use super::plan::FaultKind;
use super::{Answer, Scenario, SimVolume, Verdict, broken};
use crate::checkers::shadow::{Broken, Invariant};
use crate::world::SECOND;
use cairn_client::ClientCore;
use cairn_types::{FailureDomain, Redundancy};
use cairn_wire::mds::{MdsReply, MdsRequest, VolumeOptions};

/// Virtual time any step of the setup may take.
const STEP_MAX: u64 = 60 * SECOND;

impl Scenario {
    pub(super) fn set_up(&mut self) -> Verdict {
        self.cluster.create_first_mds();
        for _ in 0..self.plan.shape.clients {
            self.cluster.create_client();
        }
        for nth in 1..self.plan.shape.mds {
            let addr = self.cluster.next_mds_addr();
            let nonce = 0x5eed_0000 + nth as u64;
            let request = MdsRequest::MdsAdd { addr, repository: String::new(), nonce };
            let MdsReply::MdsAdmitted { mds, servers, .. } = self.call_and_wait(request)? else {
                return Err(broken(Invariant::I17, "MdsAdd was answered by something else"));
            };
            self.cluster.join_mds(mds, nonce, servers);
            self.wait("a metadata server joins", STEP_MAX, |s| {
                let count = s.cluster.mds.len();
                s.cluster.mds.iter().map(|mds| mds.node).collect::<Vec<_>>().into_iter().all(|node| {
                    let voters = s
                        .cluster
                        .world
                        .inspect::<SimMds, _>(node, |core| core.consensus().status().members.voters.len());
                    voters == Some(count)
                })
            })?;
        }
        if self.plan.faults.contains(&FaultKind::Members) || self.wrong.is_some() || self.plan.skew {
            self.cluster.create_operator();
        }
        for _ in 0..self.plan.shape.cs {
            self.cluster.create_cs();
        }
        self.wait("chunk servers register", STEP_MAX, |s| s.cluster.cs.iter().all(|cs| cs.id.is_some()))?;
        // The scrub goes at the pace the metadata servers name, from their first answer to a heartbeat on.
        let pairs = vec![("mds.wd.verify_chunks".to_owned(), self.plan.shape.scrub.to_string())];
        self.call_and_wait(MdsRequest::ConfigSet { pairs })?;
        if let Some(seconds) = self.plan.offline_after {
            for (key, value) in
                [("mds.wd.offline_tout", seconds), ("mds.wd.max_offline_cs", 0), ("mds.wd.max_offline_cs_hosts", 0)]
            {
                let request = MdsRequest::ConfigSet { pairs: vec![(key.to_owned(), value.to_string())] };
                self.call_and_wait(request)?;
            }
        }
        for (nth, volume) in self.plan.volumes.clone().into_iter().enumerate() {
            let redundancy = Redundancy::new(volume.replicas, volume.minimum).expect("drawn within its range");
            let options = VolumeOptions {
                redundancy: Some(redundancy),
                failure_domain: Some(FailureDomain::Host),
                tier: None,
                chunk_size: Some(1 << 20),
            };
            let request = MdsRequest::VolumeCreate { name: format!("v{nth}"), size: volume.size, options };
            let MdsReply::Volume(info) = self.call_and_wait(request)? else {
                return Err(broken(Invariant::I17, "VolumeCreate was answered by something else"));
            };
            self.volumes.push(SimVolume { info, unit: volume.unit });
        }
        self.loads.iter_mut().for_each(|load| load.know_volumes(self.volumes.len()));
        self.eras.know_volumes(self.volumes.len());
        self.set_up_files()
    }

    /// Calls the metadata servers through the first client; setup only.
    pub(super) fn call_and_wait(&mut self, request: MdsRequest) -> Result<MdsReply, Box<Broken>> {
        self.call_through(0, request)
    }

    /// Calls the metadata servers, which must answer, while nothing fails.
    pub(super) fn call_through(&mut self, client: usize, request: MdsRequest) -> Result<MdsReply, Box<Broken>> {
        let what = format!("{request:?}");
        let token = self.token();
        self.pending.insert(token, Pending { client, since: self.now(), kind: Kind::Setup });
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Call(result))));
            core.call(now, request, done, out);
        });
        self.wait(&what, STEP_MAX, |s| s.replies.contains_key(&token))?;
        let reply = self.replies.remove(&token).expect("just waited for");
        reply.map_err(|error| broken(Invariant::I17, format!("{what} in a healthy cluster: {error}")))
    }

    pub(super) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }
}
