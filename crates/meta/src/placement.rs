//! Placement: which servers get the copies of a chunk. Pure: a function of the wish and of what is known of the
//! servers.
//!
//! Servers are drawn pseudo-randomly by chunk id, weighted by free space, by how short their queue is and by how busy
//! they are; whole numbers only, so that every metadata server draws the same. Copies differ on the level of the
//! failure domain. When the wished tier has no room, the next lower ones are tried, then the higher ones, unless tiers
//! are strict. When domains are advisory, copies that find no domain of their own share one, but never a server.

use crate::record::{Server, Standing};
use cairn_types::{ChunkId, CsId, FailureDomain};
use std::collections::BTreeMap;

/// Highest tier.
pub const TIER_MAX: u8 = 3;
/// Per cent of a server that repair may fill, whatever the margin for new data.
pub(crate) const REPAIR_FILL_PER_CENT: u64 = 98;
/// A queue this much longer than the average (in requests) halves the weight.
const QUEUE_HALF: u64 = 16;
/// A server busy for so many thousandths of the time has half the weight.
const BUSY_HALF: u64 = 1000;

/// What placement knows of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The server.
    pub cs: CsId,
    /// Its domain on each level of [`FailureDomain::ALL`]; equal numbers, equal domain.
    pub domains: [u32; 6],
    /// Its tier.
    pub tier: u8,
    /// Weight for new data; zero takes none.
    pub weight: u64,
    /// Weight for repair; zero takes none.
    pub repair_weight: u64,
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// The chunk: the source of chance.
    pub chunk: ChunkId,
    /// Servers wanted.
    pub count: usize,
    /// Level on which copies differ.
    pub domain: FailureDomain,
    /// Tier.
    pub tier: u8,
    /// Never two copies in one domain.
    pub strict_domain: bool,
    /// Never another tier.
    pub strict_tier: bool,
    /// For repair, which may use space that new data may not.
    pub repair: bool,
    /// Servers that have copies and stay: their domains are taken.
    pub members: &'a [CsId],
    /// Further servers not to choose; their domains are not taken.
    pub excluded: &'a [CsId],
}

impl Wish<'_> {
    fn weight(&self, slot: &Slot) -> u64 {
        if self.repair { slot.repair_weight } else { slot.weight }
    }

    fn level(&self) -> usize {
        self.domain as usize
    }
}

/// The tiers to try, in order.
fn tiers(wish: &Wish<'_>) -> impl Iterator<Item = u8> {
    let (tier, strict) = (wish.tier, wish.strict_tier);
    let spill = (0..tier).rev().chain(tier + 1..=TIER_MAX).filter(move |_| !strict);
    std::iter::once(tier).chain(spill)
}

/// Chooses up to `wish.count` servers; fewer when there are not enough.
pub fn choose(wish: &Wish<'_>, slots: &[Slot]) -> Vec<CsId> {
    let domain_of = |cs: CsId, level: usize| {
        slots.binary_search_by_key(&cs, |slot| slot.cs).ok().map(|at| slots[at].domains[level])
    };
    let mut chosen: Vec<CsId> = Vec::with_capacity(wish.count);
    while chosen.len() < wish.count {
        let taken: Vec<CsId> = wish.members.iter().chain(&chosen).copied().collect();
        // Advisory: from the wished level down to the narrowest that still has room.
        let levels = if wish.strict_domain { wish.level()..=wish.level() } else { 0..=wish.level() };
        let found = levels.rev().find_map(|level| {
            let domains: Vec<u32> = taken.iter().filter_map(|cs| domain_of(*cs, level)).collect();
            let eligible = |slot: &&Slot| {
                wish.weight(slot) > 0
                    && !taken.contains(&slot.cs)
                    && !wish.excluded.contains(&slot.cs)
                    && !domains.contains(&slot.domains[level])
            };
            tiers(wish).find_map(|tier| {
                let candidates = || slots.iter().filter(|slot| slot.tier == tier).filter(eligible);
                draw(candidates, wish, taken.len() as u64)
            })
        });
        match found {
            Some(cs) => chosen.push(cs),
            None => break,
        }
    }
    chosen
}

/// Draws one of the candidates by weight.
fn draw<'a, I: Iterator<Item = &'a Slot>>(candidates: impl Fn() -> I, wish: &Wish<'_>, round: u64) -> Option<CsId> {
    let total: u64 = candidates().map(|slot| wish.weight(slot)).sum();
    if total == 0 {
        return None;
    }
    let chance = scramble(wish.chunk.0.wrapping_mul(31).wrapping_add(round));
    let mut ticket = ((u128::from(chance) * u128::from(total)) >> 64) as u64;
    for slot in candidates() {
        let weight = wish.weight(slot);
        if ticket < weight {
            return Some(slot.cs);
        }
        ticket -= weight;
    }
    unreachable!("the ticket is below the sum of the weights")
}

/// SplitMix64's finisher, twice, since chunk ids are neighbours.
pub(crate) fn scramble(x: u64) -> u64 {
    let once = |x: u64| {
        let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    once(once(x))
}

/// Says why a wish was not met, and what helps.
pub fn explain(wish: &Wish<'_>, needed: usize, found: usize, slots: &[Slot]) -> String {
    let open = slots.iter().filter(|slot| wish.weight(slot) > 0).count();
    let in_tier = slots.iter().filter(|slot| wish.weight(slot) > 0 && slot.tier == wish.tier).count();
    let tier = if wish.strict_tier { format!(" of tier {} (mds.alloc.strict_tier)", wish.tier) } else { String::new() };
    format!(
        "{needed} replicas{tier} are needed on different {domain}s and {found} can be placed; {open} of {all} chunk servers \
         take new data, {in_tier} of them in tier {}; add servers or space, or set failure-domain or replicas lower",
        wish.tier,
        domain = wish.domain,
        all = slots.len(),
    )
}

/// What placement sees of the servers. `margin_per_cent` stays free of new data.
pub fn slots(servers: &BTreeMap<CsId, Server>, margin_per_cent: u64) -> Vec<Slot> {
    let mut names: BTreeMap<String, u32> = BTreeMap::new();
    let mut number = |name: String| {
        let next = names.len() as u32;
        *names.entry(name).or_insert(next)
    };
    let open = servers.values().filter(|server| server.standing() == Standing::Good);
    let (count, queued) =
        open.fold((0, 0), |(count, sum), server| (count + 1, sum + u64::from(server.stats.queue_depth)));
    let average = queued / u64::max(count, 1);
    let slot = |(cs, server): (&CsId, &Server)| {
        let place = &server.location;
        let site = &place.site;
        let room = format!("{site}\0{}", place.room);
        let row = format!("{room}\0{}", place.row);
        let rack = format!("{row}\0{}", place.rack);
        let domains = [
            number(format!("disk {cs}")),
            number(format!("host {}", place.host)),
            number(format!("rack {rack}")),
            number(format!("row {row}")),
            number(format!("room {room}")),
            number(format!("site {site}")),
        ];
        let excess = u64::from(server.stats.queue_depth).saturating_sub(average);
        let weight = |fill_per_cent: u64| {
            let limit = server.stats.capacity / 100 * fill_per_cent;
            // In MiB, so that sums and products stay far from overflow.
            let room = limit.saturating_sub(server.stats.used) >> 20;
            if server.standing() == Standing::Good && room > 0 {
                (room.min(1 << 40) * QUEUE_HALF / (QUEUE_HALF + excess) * BUSY_HALF
                    / (BUSY_HALF + u64::from(server.busy)))
                .max(1)
            } else {
                0
            }
        };
        Slot {
            cs: *cs,
            domains,
            tier: server.tier,
            weight: weight(100 - margin_per_cent.min(100)),
            repair_weight: weight(REPAIR_FILL_PER_CENT),
        }
    };
    servers.iter().map(slot).collect()
}

/// Bytes of user data that fit into domains of these sizes with `copies` copies, each in a domain of its own.
///
/// The largest total `T` with `sum(min(size, T)) >= copies * T`: beyond it some copy finds no domain.
pub fn allocatable(sizes: &[u64], copies: u64) -> u64 {
    let fits = |total: u64| {
        let room: u128 = sizes.iter().map(|size| u128::from(*size.min(&total))).sum();
        room >= u128::from(copies) * u128::from(total)
    };
    let (mut low, mut high) = (0, sizes.iter().copied().max().unwrap_or(0));
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests;
