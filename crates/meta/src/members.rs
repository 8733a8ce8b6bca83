//! The metadata servers themselves: ids are given once per joining nonce and never again.

use crate::command::{Answer, MetaEffect};
use crate::kv::Kv;
use crate::record::Member;
use crate::state::{Meta, short};
use cairn_types::MdsId;
use cairn_wire::mds::{MdsError, MdsInfo, MdsReply, Severity};
use std::net::SocketAddr;

/// Most metadata servers of a cluster.
pub const MEMBERS_MAX: usize = 15;

impl<K: Kv> Meta<K> {
    pub(crate) fn mds_bootstrap(&mut self, first: MdsInfo) {
        let member = Member { info: MdsInfo { voter: true, ..first }, nonce: 0, leaving: false };
        self.globals.members.insert(member.info.mds, member);
        self.changed();
        self.topology_changed();
    }

    pub(crate) fn mds_add(&mut self, addr: SocketAddr, repository: String, nonce: u64) -> Answer {
        let repository = short(&repository);
        let known = self.globals.members.values().find(|member| member.nonce == nonce && member.nonce != 0);
        let info = match known {
            Some(member) if member.leaving => {
                return Err(MdsError::Refused(format!("{} is being removed", member.info.mds)));
            }
            Some(member) => member.info.clone(),
            None => {
                if nonce == 0 {
                    return Err(MdsError::Invalid("the nonce is drawn and not zero".into()));
                }
                if let Some(member) = self.globals.members.values().find(|member| member.info.addr == addr) {
                    let (mds, hint) = match member.leaving {
                        true => (member.info.mds, "it is leaving the cluster; try again in a moment"),
                        false => (member.info.mds, "give another address, or remove that server first"),
                    };
                    return Err(MdsError::Refused(format!("{mds} of this cluster has the address {addr}; {hint}")));
                }
                if self.globals.members.len() >= MEMBERS_MAX {
                    return Err(MdsError::Refused(format!("a cluster has at most {MEMBERS_MAX} metadata servers")));
                }
                let mds = MdsId(self.globals.next_mds);
                self.globals.next_mds += 1;
                let info = MdsInfo { mds, addr, voter: false, repository };
                self.globals.members.insert(mds, Member { info: info.clone(), nonce, leaving: false });
                self.changed();
                self.digest(&cairn_wire::encode(&info));
                self.topology_changed();
                self.event(Severity::Info, "MDS-1020", format!("{mds} at {addr} was admitted"));
                info
            }
        };
        self.effect(MetaEffect::MdsAdmitted(info.clone()));
        let identity = self.globals.identity.as_ref().expect("checked before dispatch");
        Ok(MdsReply::MdsAdmitted {
            mds: info.mds,
            cluster: identity.cluster,
            name: identity.name.clone(),
            servers: self.members().collect(),
        })
    }

    pub(crate) fn mds_remove(&mut self, mds: MdsId) -> Answer {
        let staying = self
            .globals
            .members
            .values()
            .filter(|member| member.info.voter && !member.leaving && member.info.mds != mds);
        let staying = staying.count();
        let member = self.globals.members.get_mut(&mds).ok_or_else(|| MdsError::NotFound(mds.to_string()))?;
        if staying == 0 {
            return Err(MdsError::Refused(format!("{mds} is the last metadata server that votes")));
        }
        member.leaving = true;
        self.changed();
        self.digest(&mds.0.to_le_bytes());
        self.effect(MetaEffect::MdsRemoving(mds));
        Ok(MdsReply::Done)
    }

    pub(crate) fn mds_voter(&mut self, mds: MdsId, voter: bool) {
        let Some(member) = self.globals.members.get_mut(&mds).filter(|member| member.info.voter != voter) else {
            return;
        };
        member.info.voter = voter;
        let addr = member.info.addr;
        self.digest(&mds.0.to_le_bytes());
        self.topology_changed();
        let text = format!("{mds} at {addr} {}", if voter { "votes" } else { "no longer votes" });
        self.event(Severity::Info, "MDS-1021", text);
    }

    pub(crate) fn mds_left(&mut self, mds: MdsId) {
        let Some(member) = self.globals.members.remove(&mds) else { return };
        self.digest(&mds.0.to_le_bytes());
        self.topology_changed();
        self.forget_condition(mds);
        self.event(Severity::Info, "MDS-1022", format!("{mds} at {} was removed", member.info.addr));
    }

    /// The metadata servers, those that leave included.
    pub fn members(&self) -> impl Iterator<Item = MdsInfo> + '_ {
        self.globals.members.values().map(|member| member.info.clone())
    }

    /// The registry of metadata servers as it stands, with joining nonces: what a leader brings the group in line with.
    pub fn registry(&self) -> impl Iterator<Item = &Member> + '_ {
        self.globals.members.values()
    }

    /// The metadata servers that were asked to leave: a new leader goes on with it.
    pub fn members_leaving(&self) -> impl Iterator<Item = MdsId> + '_ {
        self.globals.members.values().filter(|member| member.leaving).map(|member| member.info.mds)
    }
}
