//! Release levels: who is at which, who is let in, and when the cluster may be raised. See `docs/design/upgrades.md`.
//!
//! What is known of others is volatile, from the handshakes of links that stand. It helps operators; the state and the
//! stamps of the log keep out what is too old or too new.

use crate::base::Base;
use crate::core::MdsCore;
use cairn_types::{ClientId, Level, NodeId};
use cairn_wire::LinkId;
use cairn_wire::mds::{CsState, MdsError, MdsReply, MdsRequest, MemberLevel};

/// Names in a refusal; the rest is counted.
const NAMES_MAX: usize = 8;

impl<B: Base> MdsCore<B> {
    /// The level this server runs at.
    pub fn level(&self) -> Level {
        self.config.level
    }

    /// Why a call that came over a link is not taken, whatever it asks, if so.
    pub(crate) fn refuse_level(&self, link: LinkId, request: &MdsRequest) -> Option<MdsError> {
        if request.level() > self.config.level {
            // Only what is of a later release, or took another one for it, asks that.
            let text =
                format!("a request of {}, and this metadata server is of {}", request.level(), self.config.level);
            return Some(MdsError::Invalid(text));
        }
        let peer = self.calls.level(link)?;
        let cluster = self.meta.level();
        (peer < cluster).then(|| {
            MdsError::Refused(format!(
                "this process is of release {peer}, and the cluster was raised to {cluster}: start it with the newer release; \
                 nothing it keeps is lost"
            ))
        })
    }

    /// Why a call that changes something is not proposed by this leader, if so.
    pub(crate) fn refuse_to_log(&self, request: &MdsRequest) -> Option<String> {
        let cluster = self.meta.level();
        match request {
            MdsRequest::LevelRaise { level } if *level > self.config.level => Some(format!(
                "the leading metadata server is itself of release {}: start the newer release everywhere first",
                self.config.level
            )),
            MdsRequest::LevelRaise { level } if *level > cluster => self.hinder(*level),
            request if request.level() > cluster => {
                Some(format!("a request of {} in a cluster at {cluster}", request.level()))
            }
            _ => None,
        }
    }

    /// Who keeps the cluster from a level, if anybody does.
    fn hinder(&self, level: Level) -> Option<String> {
        let members = self.member_levels();
        let late: Vec<String> = members
            .iter()
            .filter(|member| member.level.is_none_or(|theirs| theirs < level))
            .map(|member| {
                let at = member.level.map_or_else(|| "is not heard".to_owned(), |level| format!("is of {level}"));
                format!("{} ({}) {at}", name(member.node), member.what)
            })
            .collect();
        let more = late.len().saturating_sub(NAMES_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let named = late.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>().join("; ");
        (!late.is_empty()).then(|| {
            format!(
                "not everybody is of {level} yet: {named}{more}. Start the newer release there, or remove what is gone for \
                 good (`cairn rm-mds`, `rm-cs`, `revoke`); a client that is not heard ends by itself within seconds"
            )
        })
    }

    /// The levels of all others, as this leader hears them.
    fn member_levels(&self) -> Vec<MemberLevel> {
        let of = |link: Option<LinkId>| link.and_then(|link| self.calls.level(link));
        let others = self.meta.members().filter(|info| info.mds != self.config.id);
        let mds = others.map(|info| MemberLevel {
            node: NodeId::Mds(info.mds),
            what: info.addr.to_string(),
            level: of(self.group.link(info.mds)),
        });
        let servers = self.meta.cs_infos().into_iter().filter(|info| info.state != CsState::Dropped);
        let cs = servers.map(|info| MemberLevel {
            node: NodeId::Cs(info.cs),
            what: info.location.host_name,
            level: of(self.calls.server_link(info.cs)),
        });
        let clients = self.meta.session_infos().into_iter().map(|info| MemberLevel {
            node: NodeId::Client(info.client),
            what: format!("{}, {}", info.host_name, info.purpose),
            level: of(self.calls.session_link(info.client)),
        });
        mds.chain(cs).chain(clients).collect()
    }

    /// Answers [`MdsRequest::Levels`].
    pub(crate) fn levels(&self, asks: ClientId) -> Result<MdsReply, MdsError> {
        if !self.leading {
            return Err(self.not_leader());
        }
        let mut members = self.member_levels();
        members.retain(|member| member.node != NodeId::Client(asks));
        Ok(MdsReply::Levels { cluster: self.meta.level(), leader: self.config.level, members })
    }

    /// What the operator reads when the state or the log is above this release.
    pub(crate) fn too_new(&self, what: &str, level: Level) -> String {
        format!(
            "{what} in {} is of release {level}, and this metadata server is of {}: the cluster was raised to {level}, and there \
             is no way back. Start the newer release; nothing is lost",
            self.config.repository, self.config.level
        )
    }
}

fn name(node: NodeId) -> String {
    match node {
        NodeId::Mds(mds) => format!("metadata server {}", mds.0),
        NodeId::Cs(cs) => format!("chunk server {}", cs.0),
        NodeId::Client(client) => format!("client {}", client.0),
    }
}
