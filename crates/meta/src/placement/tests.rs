//! Properties of placement.

use super::*;
use proptest::prelude::*;

fn slot(cs: u32, host: u32, tier: u8, weight: u64) -> Slot {
    Slot { cs: CsId(cs), domains: [cs, 1000 + host, 2000, 3000, 4000, 5000], tier, weight, repair_weight: weight }
}

fn wish(chunk: u64, count: usize) -> Wish<'static> {
    Wish {
        chunk: ChunkId(chunk),
        count,
        domain: FailureDomain::Host,
        tier: 0,
        strict_domain: true,
        strict_tier: false,
        repair: false,
        members: &[],
        excluded: &[],
    }
}

proptest! {
    #[test]
    fn strict_copies_never_share_a_domain_and_advisory_ones_never_a_server(
        hosts in prop::collection::vec((0u32..6, 0u8..4, 0u64..4), 1..20),
        chunk in any::<u64>(),
        count in 1usize..6,
        strict_tier in any::<bool>(),
        strict in any::<bool>(),
    ) {
        let slots: Vec<Slot> =
            hosts.iter().enumerate().map(|(at, (host, tier, weight))| slot(at as u32, *host, *tier, *weight)).collect();
        let wish = Wish { strict_domain: strict, strict_tier, tier: 1, ..wish(chunk, count) };
        let chosen = choose(&wish, &slots);
        let of = |cs: &CsId| slots[cs.0 as usize];
        let mut servers = chosen.clone();
        servers.sort_unstable();
        servers.dedup();
        prop_assert_eq!(servers.len(), chosen.len());
        prop_assert!(chosen.iter().all(|cs| of(cs).weight > 0 && (!strict_tier || of(cs).tier == 1)));
        let mut domains: Vec<u32> = chosen.iter().map(|cs| of(cs).domains[1]).collect();
        domains.sort_unstable();
        domains.dedup();
        let open = slots.iter().filter(|slot| slot.weight > 0 && (!strict_tier || slot.tier == 1));
        if strict {
            prop_assert_eq!(domains.len(), chosen.len());
            let mut hosts: Vec<u32> = open.map(|slot| slot.domains[1]).collect();
            hosts.sort_unstable();
            hosts.dedup();
            prop_assert_eq!(chosen.len(), count.min(hosts.len()));
        } else {
            prop_assert_eq!(chosen.len(), count.min(open.count()));
        }
        prop_assert_eq!(choose(&wish, &slots), chosen);
    }
}

#[test]
fn chunks_spread_in_proportion_to_weight() {
    let slots: Vec<Slot> = (0..12).map(|cs| slot(cs, cs, 0, 100 + 50 * u64::from(cs % 3))).collect();
    let mut counts = [0u64; 12];
    for chunk in 0..60_000 {
        for cs in choose(&wish(chunk, 1), &slots) {
            counts[cs.0 as usize] += 1;
        }
    }
    let total: u64 = slots.iter().map(|slot| slot.weight).sum();
    for (slot, count) in slots.iter().zip(counts) {
        let expected = 60_000 * slot.weight / total;
        assert!(count.abs_diff(expected) * 100 < expected * 6, "{}: {count}, expected {expected}", slot.cs);
    }
}

#[test]
fn a_full_tier_spills_down_before_it_spills_up() {
    let slots = [slot(0, 0, 0, 5), slot(1, 1, 1, 5), slot(2, 2, 2, 0), slot(3, 3, 3, 5)];
    let wish = Wish { tier: 2, ..wish(9, 3) };
    assert_eq!(choose(&wish, &slots), [CsId(1), CsId(0), CsId(3)]);
    assert!(choose(&Wish { strict_tier: true, ..wish }, &slots).is_empty());
}

#[test]
fn members_take_their_domains_and_excluded_servers_do_not() {
    let slots = [slot(0, 0, 0, 5), slot(1, 0, 0, 5), slot(2, 1, 0, 5), slot(3, 1, 0, 5)];
    let wish = Wish { members: &[CsId(0)], excluded: &[CsId(2)], ..wish(3, 1) };
    assert_eq!(choose(&wish, &slots), [CsId(3)]);
}

#[test]
fn allocatable_space_matches_the_worked_cases() {
    assert_eq!(allocatable(&[200, 500, 1000], 3), 200);
    assert_eq!(allocatable(&[200, 500, 1000], 2), 700);
    assert_eq!(allocatable(&[200, 500, 1000], 1), 1000);
    assert_eq!(allocatable(&[], 2), 0);
}
