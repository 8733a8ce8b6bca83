//! `upgrade`: who runs which release, and the end of an upgrade.

use crate::context::{Context, unexpected};
use anyhow::{Result, bail};
use cairn_types::{Level, NodeId};
use cairn_wire::mds::{MdsReply, MdsRequest, MemberLevel};
use clap::Args;
use serde_json::json;

/// Options of `upgrade`.
#[derive(Args, Debug)]
pub struct UpgradeArgs {
    /// Uses what the new release brought; the one before cannot be started again afterwards.
    #[arg(long)]
    finalize: bool,
}

/// Runs `upgrade`.
pub fn run(context: &Context, args: &UpgradeArgs) -> Result<()> {
    let (cluster, leader, members) = match context.call(MdsRequest::Levels)? {
        MdsReply::Levels { cluster, leader, members } => (cluster, leader, members),
        other => return Err(unexpected(&other)),
    };
    if args.finalize {
        return finalize(context, cluster, leader);
    }
    if context.json() {
        let members: Vec<_> = members.iter().map(member_json).collect();
        let all = json!({"level": cluster.0, "leader_level": leader.0, "members": members});
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("Cluster: {cluster}; the leading metadata server: {leader}");
    println!("\n{:<7} {:>6}  {:<6} WHERE", "TYPE", "ID", "LEVEL");
    for member in &members {
        let (kind, id) = name(member.node);
        let level = member.level.map_or_else(|| "?".to_owned(), |level| level.0.to_string());
        println!("{kind:<7} {id:>6}  {level:<6} {}", member.what);
    }
    println!();
    if leader <= cluster {
        println!("Nothing to finalize.");
    } else if members.iter().all(|member| member.level >= Some(cluster.next())) {
        println!("Everybody is at {}: `cairn upgrade --finalize` ends the upgrade.", cluster.next());
    } else {
        println!("Under way to {}: the release before can still be started again everywhere.", cluster.next());
    }
    Ok(())
}

fn finalize(context: &Context, cluster: Level, leader: Level) -> Result<()> {
    if leader <= cluster {
        bail!("nothing to finalize: the cluster is at {cluster}, and so is the leading metadata server");
    }
    let level = cluster.next();
    match context.call(MdsRequest::LevelRaise { level })? {
        MdsReply::Done if context.json() => println!("{}", json!({"level": level.0})),
        MdsReply::Done => println!("The cluster is at {level} from now on."),
        other => return Err(unexpected(&other)),
    }
    Ok(())
}

fn name(node: NodeId) -> (&'static str, u64) {
    match node {
        NodeId::Mds(mds) => ("MDS", mds.0),
        NodeId::Cs(cs) => ("CS", u64::from(cs.0)),
        NodeId::Client(client) => ("CLIENT", client.0),
    }
}

fn member_json(member: &MemberLevel) -> serde_json::Value {
    let (kind, id) = name(member.node);
    json!({"type": kind, "id": id, "level": member.level.map(|level| level.0), "where": member.what})
}
