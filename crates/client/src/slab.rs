//! A slab whose keys are never mistaken for an earlier tenant's: the key carries a generation.

/// Items in numbered places; a key is a place and the generation of its tenant.
pub(crate) struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

fn split(key: u64) -> (usize, u32) {
    ((key & 0xffff_ffff) as usize, (key >> 32) as u32)
}

impl<T> Slab<T> {
    /// Adds an item and returns its key; zero is never a key.
    pub(crate) fn insert(&mut self, item: T) -> u64 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            u32::try_from(self.places.len() - 1).expect("fewer than 2^32 items at once")
        });
        let (generation, tenant) = &mut self.places[place as usize];
        assert!(tenant.is_none(), "a free place has no tenant");
        *generation = generation.wrapping_add(1).max(1);
        *tenant = Some(item);
        u64::from(*generation) << 32 | u64::from(place)
    }

    /// The item of a key, unless it was removed.
    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let (place, generation) = split(key);
        self.places.get(place).filter(|(g, _)| *g == generation)?.1.as_ref()
    }

    /// As [`Slab::get`], to change.
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (place, generation) = split(key);
        self.places.get_mut(place).filter(|(g, _)| *g == generation)?.1.as_mut()
    }

    /// Takes an item out.
    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let (place, generation) = split(key);
        let item = self.places.get_mut(place).filter(|(g, _)| *g == generation)?.1.take()?;
        self.free.push(place as u32);
        Some(item)
    }

    /// Keys and items in order of place: the same order in every run.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.places
            .iter()
            .enumerate()
            .filter_map(|(place, (g, item))| item.as_ref().map(|item| (u64::from(*g) << 32 | place as u64, item)))
    }

    /// The keys, in order of place.
    pub(crate) fn keys(&self) -> Vec<u64> {
        self.iter().map(|(key, _)| key).collect()
    }

    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn a_key_dies_with_its_tenant() {
        let mut slab = Slab::default();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert!(slab.get(a).is_none() && slab.get(b) == Some(&'b') && slab.len() == 1 && a != 0);
    }
}
