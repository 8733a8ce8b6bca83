//! Verbs about the cluster as a whole: services, health, configuration, events, fencing.

use crate::context::{Context, unexpected};
use crate::exit::usage;
use anyhow::{Result, bail};
use cairn_types::{ClientId, format_size};
use cairn_wire::mds::{
    ClusterHealth, ClusterStat, CsInfo, CsState, MdsCondition, MdsInfo, MdsLag, MdsReply, MdsRequest, Severity,
};
use clap::Args;
use serde_json::json;
use std::collections::VecDeque;

/// Options of `list-services`.
#[derive(Args, Debug)]
pub struct ListServicesArgs {
    /// Only metadata servers of this machine, with their repositories.
    #[arg(short = 'M')]
    mds: bool,
    /// Only chunk servers of this machine, with their repositories.
    #[arg(short = 'C')]
    cs: bool,
}

/// Options of `set-config`.
#[derive(Args, Debug)]
pub struct SetConfigArgs {
    /// `key=value`, several allowed.
    #[arg(required = true)]
    pairs: Vec<String>,
}

/// Options of `get-event`.
#[derive(Args, Debug)]
pub struct GetEventArgs {
    /// Only events after this number.
    #[arg(long, default_value_t = 0)]
    after: u64,
    /// At most so many, the newest.
    #[arg(short = 'n', long, default_value_t = 100)]
    count: u32,
}

/// Options of `revoke`.
#[derive(Args, Debug)]
pub struct RevokeArgs {
    /// Id of the client, as `stat` shows it.
    client: u64,
}

fn stat_of(context: &Context) -> Result<ClusterStat> {
    match context.call(MdsRequest::Stat)? {
        MdsReply::Stat(stat) => Ok(*stat),
        other => Err(unexpected(&other)),
    }
}

/// Word for a state of a chunk server.
pub fn state_word(state: CsState) -> &'static str {
    match state {
        CsState::Active => "active",
        CsState::Inactive => "inactive",
        CsState::Offline => "offline",
        CsState::Draining => "draining",
        CsState::Failed => "failed",
        CsState::Dropped => "dropped",
    }
}

/// Site, room, row and rack of a chunk server, the widest first; empty when the operator gave none.
fn place_word(cs: &CsInfo) -> String {
    let place = &cs.location;
    let named = [("site", &place.site), ("room", &place.room), ("row", &place.row), ("rack", &place.rack)];
    let given = named.iter().filter(|(_, name)| !name.is_empty());
    given.map(|(level, name)| format!("{level} {name}")).collect::<Vec<_>>().join(", ")
}

fn mds_condition(stat: &ClusterStat, server: &MdsInfo) -> MdsCondition {
    let found = stat.mds_ill.iter().find(|(mds, _)| *mds == server.mds);
    found.map(|(_, condition)| *condition).unwrap_or_default()
}

fn mds_word(stat: &ClusterStat, server: &MdsInfo) -> &'static str {
    match mds_condition(stat, server).lag {
        _ if stat.leader == Some(server.mds) => "leader",
        _ if stat.mds_silent.contains(&server.mds) => "silent",
        MdsLag::Resync => "resyncing",
        MdsLag::Behind | MdsLag::Silent => "stale",
        MdsLag::None if server.voter => "follower",
        MdsLag::None => "learner",
    }
}

/// A word more when its disk has no room.
fn room_word(stat: &ClusterStat, server: &MdsInfo) -> &'static str {
    if mds_condition(stat, server).no_room { ", no room on its disk" } else { "" }
}

fn health_word(health: ClusterHealth) -> &'static str {
    match health {
        ClusterHealth::Healthy => "healthy",
        ClusterHealth::Degraded => "degraded",
        ClusterHealth::Failed => "failed",
        ClusterHealth::Unknown => "unknown",
    }
}

fn cs_json(cs: &CsInfo) -> serde_json::Value {
    json!({
        "id": cs.cs.0, "addr": cs.addr, "host": cs.location.host_name, "host_id": cs.location.host.to_string(),
        "rack": cs.location.rack, "row": cs.location.row, "room": cs.location.room, "site": cs.location.site,
        "state": state_word(cs.state), "tier": cs.tier, "capacity": cs.stats.capacity, "used": cs.stats.used,
        "chunks": cs.stats.chunks, "repository": cs.repository,
    })
}

/// Runs `list-services`.
pub fn list_services(context: &Context, args: &ListServicesArgs) -> Result<()> {
    let stat = stat_of(context)?;
    let local = args.mds || args.cs;
    let host = context.host()?;
    let local_addr = |addr: std::net::SocketAddr| std::net::TcpListener::bind((addr.ip(), 0)).is_ok();
    let mds: Vec<_> = stat.mds.iter().filter(|m| !local || (args.mds && local_addr(m.addr))).collect();
    let is_here = |cs: &CsInfo| cs.location.host == host || local_addr(cs.addr);
    let cs: Vec<_> = stat.cs.iter().filter(|c| !local || (args.cs && is_here(c))).collect();
    if context.json() {
        let mds: Vec<_> = mds
            .iter()
            .map(|m| json!({"id": m.mds.0, "addr": m.addr, "state": mds_word(&stat, m), "leader": stat.leader == Some(m.mds), "voter": m.voter, "no_room": mds_condition(&stat, m).no_room, "repository": m.repository}))
            .collect();
        let cs: Vec<_> = cs.iter().map(|c| cs_json(c)).collect();
        println!("{}", serde_json::to_string_pretty(&json!({"mds": mds, "cs": cs}))?);
        return Ok(());
    }
    println!("{:<5} {:>6}  {:<22} {:<10} REPOSITORY", "TYPE", "ID", "ADDRESS", "STATE");
    for server in mds {
        let state = mds_word(&stat, server);
        println!("{:<5} {:>6}  {:<22} {state:<10} {}", "MDS", server.mds.0, server.addr, server.repository);
    }
    for server in cs {
        let state = state_word(server.state);
        println!("{:<5} {:>6}  {:<22} {state:<10} {}", "CS", server.cs.0, server.addr, server.repository);
    }
    Ok(())
}

/// Runs `stat`.
pub fn stat(context: &Context) -> Result<()> {
    let stat = stat_of(context)?;
    if context.json() {
        return stat_json(&stat);
    }
    println!("Cluster {} ({}): {}", stat.name, stat.cluster, health_word(stat.health));
    let free = stat.capacity.saturating_sub(stat.used);
    let (total, used, free) = (format_size(stat.capacity), format_size(stat.used), format_size(free));
    println!("Space: {total} raw, {used} used ({} %), {free} free", per_cent(stat.used, stat.capacity));
    if let Some(line) = full_line(&stat) {
        println!("{line}");
    }
    println!("Files and directories: {}, volumes: {}", stat.inodes, stat.volumes);
    print_chunks(&stat);
    println!("\n{:<6} {:<22} STATE", "MDS", "ADDRESS");
    for server in &stat.mds {
        let state = mds_word(&stat, server);
        println!("{:<6} {:<22} {state}{}", server.mds.0, server.addr, room_word(&stat, server));
    }
    let place_title = if stat.cs.iter().all(|cs| place_word(cs).is_empty()) { "" } else { "  PLACE" };
    println!(
        "\n{:<6} {:<22} {:<16} {:<9} {:>4} {:>10} {:>10} {:>7} {:>6}{place_title}",
        "CS", "ADDRESS", "HOST", "STATE", "TIER", "SPACE", "USED", "CHUNKS", "QUEUE"
    );
    for cs in &stat.cs {
        let (space, used) = (format_size(cs.stats.capacity), format_size(cs.stats.used));
        let line = format!(
            "{:<6} {:<22} {:<16} {:<9} {:>4} {space:>10} {used:>10} {:>7} {:>6}  {}",
            cs.cs.0,
            cs.addr,
            cs.location.host_name,
            state_word(cs.state),
            cs.tier,
            cs.stats.chunks,
            cs.stats.queue_depth,
            place_word(cs)
        );
        println!("{}", line.trim_end());
    }
    println!("\n{:<8} {:<16} {:>7}  PURPOSE", "CLIENT", "HOST", "LEASES");
    for client in &stat.clients {
        println!("{:<8} {:<16} {:>7}  {}", client.client.0, client.host_name, client.leases, client.purpose);
    }
    Ok(())
}

/// Used per cent, rounded down: 100 means full.
fn per_cent(used: u64, capacity: u64) -> u64 {
    (u128::from(used) * 100 / u128::from(capacity.max(1))) as u64
}

/// A line about servers that are filling up; the same limits as the events MDS-3002 and MDS-3003.
fn full_line(stat: &ClusterStat) -> Option<String> {
    let in_use = stat.cs.iter().filter(|cs| cs.state != CsState::Dropped);
    let fills: Vec<u64> = in_use.map(|cs| per_cent(cs.stats.used, cs.stats.capacity)).collect();
    let (full, filling) =
        (fills.iter().filter(|fill| **fill >= 95).count(), fills.iter().filter(|f| **f >= 80).count());
    let of = fills.len();
    if full > 0 {
        Some(format!("FULL: {full} of {of} chunk servers are 95 % full or more; add servers or delete data"))
    } else {
        (filling > 0).then(|| format!("Filling up: {filling} of {of} chunk servers are 80 % full or more"))
    }
}

fn print_chunks(stat: &ClusterStat) {
    let c = &stat.chunks;
    let named = [
        ("healthy", c.healthy),
        ("standby", c.standby),
        ("degraded", c.degraded),
        ("urgent", c.urgent),
        ("blocked", c.blocked),
        ("pending", c.pending),
        ("offline", c.offline),
        ("replicating", c.replicating),
        ("overcommitted", c.overcommitted),
        ("deleting", c.deleting),
        ("void", c.void),
    ];
    let shown: Vec<String> = named
        .iter()
        .filter(|(name, count)| *count > 0 || *name == "healthy")
        .map(|(name, count)| {
            let percent = if c.total == 0 { 100.0 } else { 100.0 * *count as f64 / c.total as f64 };
            format!("{name} {count} ({percent:.0} %)")
        })
        .collect();
    println!("Chunks: {} in all; {}", c.total, shown.join(", "));
}

fn stat_json(stat: &ClusterStat) -> Result<()> {
    let c = &stat.chunks;
    let mds: Vec<_> = stat
        .mds
        .iter()
        .map(|m| json!({"id": m.mds.0, "addr": m.addr, "state": mds_word(stat, m), "leader": stat.leader == Some(m.mds), "voter": m.voter, "no_room": mds_condition(stat, m).no_room}))
        .collect();
    let clients: Vec<_> = stat
        .clients
        .iter()
        .map(|s| json!({"id": s.client.0, "host": s.host_name, "purpose": s.purpose, "leases": s.leases}))
        .collect();
    let value = json!({
        "name": stat.name, "id": stat.cluster.to_string(), "health": health_word(stat.health),
        "capacity": stat.capacity, "used": stat.used, "inodes": stat.inodes, "volumes": stat.volumes,
        "chunks": {"total": c.total, "healthy": c.healthy, "standby": c.standby, "degraded": c.degraded,
            "urgent": c.urgent, "blocked": c.blocked, "pending": c.pending, "offline": c.offline,
            "replicating": c.replicating, "overcommitted": c.overcommitted, "deleting": c.deleting, "void": c.void},
        "mds": mds, "cs": stat.cs.iter().map(cs_json).collect::<Vec<_>>(), "clients": clients,
    });
    println!("{}", serde_json::to_string_pretty(&value)?);
    Ok(())
}

/// Runs `get-config`.
pub fn get_config(context: &Context) -> Result<()> {
    let MdsReply::Pairs(pairs) = context.call(MdsRequest::ConfigList)? else { bail!("unexpected answer") };
    if context.json() {
        let map: std::collections::BTreeMap<_, _> = pairs.into_iter().collect();
        println!("{}", serde_json::to_string_pretty(&map)?);
    } else {
        pairs.iter().for_each(|(key, value)| println!("{key}={value}"));
    }
    Ok(())
}

/// Runs `set-config`.
pub fn set_config(context: &Context, args: &SetConfigArgs) -> Result<()> {
    let pairs: Vec<(String, String)> = args
        .pairs
        .iter()
        .map(|pair| {
            let (key, value) = pair.split_once('=').ok_or_else(|| usage(format!("`{pair}` is not key=value")))?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect::<Result<_>>()?;
    context.call(MdsRequest::ConfigSet { pairs })?;
    Ok(())
}

/// Runs `get-event`.
pub fn get_event(context: &Context, args: &GetEventArgs) -> Result<()> {
    let events = context.block_on(async |client| {
        let (mut newest, mut after) = (VecDeque::new(), args.after);
        loop {
            let MdsReply::Events(page) = client.call(MdsRequest::Events { after, limit: 1000 }).await? else {
                bail!("unexpected answer to Events");
            };
            let Some(last) = page.last() else { return Ok(newest) };
            after = last.number;
            newest.extend(page);
            while newest.len() > args.count as usize {
                newest.pop_front();
            }
        }
    })?;
    for event in events {
        let severity = match event.severity {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        if context.json() {
            let line = json!({"number": event.number, "wall_ns": event.wall_ns, "severity": severity, "code": event.code, "text": event.text});
            println!("{line}");
        } else {
            println!("{} {severity:<7} {} {}", utc(event.wall_ns), event.code, event.text);
        }
    }
    Ok(())
}

/// `YYYY-MM-DD hh:mm:ss` in UTC. Source of the day arithmetic: Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn utc(wall_ns: u64) -> String {
    let seconds = wall_ns / 1_000_000_000;
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Runs `revoke`.
pub fn revoke(context: &Context, args: &RevokeArgs) -> Result<()> {
    context.call(MdsRequest::SessionRevoke { client: ClientId(args.client) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_printed_in_utc() {
        assert_eq!(super::utc(0), "1970-01-01 00:00:00");
        assert_eq!(super::utc(1_709_210_096_000_000_000), "2024-02-29 12:34:56");
    }
}
