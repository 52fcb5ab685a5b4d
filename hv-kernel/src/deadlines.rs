//! The timers of the vCPUs that are parked on one CPU.

use alloc::vec;
use alloc::vec::Vec;

/// Not in the heap.
const ABSENT: u16 = u16::MAX;

/// At most one deadline for each ID below a capacity: a binary heap that knows where each ID is.
/// It allocates when it is made and never again. All steps take a time that grows with the
/// logarithm of the length.
pub struct Deadlines {
    /// Deadline, in the host's TSC, and ID. No entry is smaller than its parent: that of index
    /// `i` is at `(i - 1) / 2`.
    heap: Vec<(u64, u16)>,
    /// Where in the heap each ID is, or [`ABSENT`].
    places: Vec<u16>,
}

impl Deadlines {
    /// None yet; IDs are below `capacity`.
    ///
    /// # Panics
    ///
    /// If `capacity` is larger than 65535: a mistake of ours, as are IDs that are too large below.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity <= usize::from(ABSENT), "deadlines: {capacity} are too many");
        Self { heap: Vec::with_capacity(capacity), places: vec![ABSENT; capacity] }
    }

    /// `id` is due at `deadline`, whatever it was before.
    pub fn set(&mut self, id: u16, deadline: u64) {
        let place = match self.places[usize::from(id)] {
            ABSENT => {
                self.heap.push((deadline, id));
                self.heap.len() - 1
            }
            place => {
                self.heap[usize::from(place)].0 = deadline;
                place.into()
            }
        };
        self.settle(place);
    }

    /// `id` has no deadline any more, if it had one.
    pub fn remove(&mut self, id: u16) {
        let place = self.places[usize::from(id)];
        if place == ABSENT {
            return;
        }
        self.places[usize::from(id)] = ABSENT;
        self.heap.swap_remove(place.into());
        if usize::from(place) < self.heap.len() {
            self.settle(place.into());
        }
    }

    /// The first deadline and whose it is; among equals that of the smallest ID.
    pub fn first(&self) -> Option<(u64, u16)> {
        self.heap.first().copied()
    }

    /// Removes the first deadline and says whose it was, if it is not later than `now`.
    pub fn pop_due(&mut self, now: u64) -> Option<u16> {
        let (_, id) = self.first().filter(|(deadline, _)| *deadline <= now)?;
        self.remove(id);
        Some(id)
    }

    /// Moves the entry at `place`, the only one that may be out of order, to where it belongs.
    fn settle(&mut self, mut place: usize) {
        while place > 0 && self.heap[place] < self.heap[(place - 1) / 2] {
            place = self.swap(place, (place - 1) / 2);
        }
        loop {
            let children = 2 * place + 1..self.heap.len().min(2 * place + 3);
            let smallest = children.min_by_key(|child| self.heap[*child]);
            let Some(child) = smallest.filter(|child| self.heap[*child] < self.heap[place]) else {
                break;
            };
            place = self.swap(place, child);
        }
        self.note(place);
    }

    /// Exchanges two entries; says where the first one is now. Its place is not noted yet.
    fn swap(&mut self, from: usize, to: usize) -> usize {
        self.heap.swap(from, to);
        self.note(from);
        to
    }

    /// Notes where the entry at `place` is.
    fn note(&mut self, place: usize) {
        // Not more entries than IDs, which are less than 65536.
        self.places[usize::from(self.heap[place].1)] = place as u16;
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Numbers without an order, always the same ones (Marsaglia's xorshift).
    pub struct Random(u64);

    impl Random {
        pub fn new() -> Self {
            Self(0x2545_f491_4f6c_dd1d)
        }

        pub fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }

    #[test]
    fn the_first_one_is_due_first() {
        let mut deadlines = Deadlines::new(4);
        assert_eq!((deadlines.first(), deadlines.pop_due(u64::MAX)), (None, None));
        deadlines.set(2, 30);
        deadlines.set(0, 20);
        deadlines.set(3, 20);
        assert_eq!(deadlines.first(), Some((20, 0)));
        assert_eq!(deadlines.pop_due(19), None);
        assert_eq!(deadlines.pop_due(20), Some(0));
        deadlines.set(2, 10);
        deadlines.remove(1);
        assert_eq!(deadlines.first(), Some((10, 2)));
        deadlines.remove(2);
        assert_eq!(deadlines.pop_due(u64::MAX), Some(3));
        assert_eq!(deadlines.first(), None);
    }

    #[test]
    fn it_does_what_a_sorted_map_does_and_never_grows() {
        for capacity in [1u16, 2, 3, 7, 40] {
            let mut random = Random::new();
            let mut deadlines = Deadlines::new(capacity.into());
            let before = deadlines.heap.capacity();
            let mut model = BTreeMap::new();
            for _ in 0..20_000 {
                let id = random.below(capacity.into()) as u16;
                let time = random.below(100);
                let first = |model: &BTreeMap<u16, u64>| {
                    model.iter().map(|(id, deadline)| (*deadline, *id)).min()
                };
                match random.below(4) {
                    0 | 1 => {
                        deadlines.set(id, time);
                        model.insert(id, time);
                    }
                    2 => {
                        deadlines.remove(id);
                        model.remove(&id);
                    }
                    _ => {
                        let due = first(&model).filter(|(deadline, _)| *deadline <= time);
                        assert_eq!(deadlines.pop_due(time), due.map(|(_, id)| id));
                        due.map(|(_, id)| model.remove(&id));
                    }
                }
                assert_eq!(deadlines.first(), first(&model));
                assert_eq!(deadlines.heap.len(), model.len());
            }
            assert_eq!(deadlines.heap.capacity(), before);
        }
    }

    #[test]
    #[should_panic(expected = "index out of bounds")]
    fn an_id_that_is_too_large_is_a_mistake_of_ours() {
        Deadlines::new(3).set(3, 0);
    }
}
