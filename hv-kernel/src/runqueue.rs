//! The run queue of one CPU: who waits for it, in the order of weighted virtual time. Only that CPU
//! touches it.

use alloc::collections::{BinaryHeap, VecDeque};
use core::cmp::Ordering;

/// One that waits.
struct Entry<T> {
    vruntime: u64,
    /// Counts what was ever pushed: among equals, who came first goes first.
    order: u64,
    item: T,
}

impl<T> Entry<T> {
    const fn key(&self) -> (u64, u64) {
        (self.vruntime, self.order)
    }
}

impl<T> Ord for Entry<T> {
    /// The smallest is the greatest: [`BinaryHeap`] has the greatest on top.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Entry<T> {}

/// Those that wait, in order. Who had its turn is mostly behind all others, so that a plain queue
/// has most of them, in order by itself; the others are in a heap. What it takes does then not grow
/// with their number.
struct Lane<T> {
    sorted: VecDeque<Entry<T>>,
    others: BinaryHeap<Entry<T>>,
}

impl<T> Lane<T> {
    fn new(capacity: usize) -> Self {
        Self {
            sorted: VecDeque::with_capacity(capacity),
            others: BinaryHeap::with_capacity(capacity),
        }
    }

    fn push(&mut self, entry: Entry<T>) {
        // Greater means earlier.
        if self.sorted.back().is_none_or(|last| *last > entry) {
            self.sorted.push_back(entry);
        } else {
            self.others.push(entry);
        }
    }

    #[inline]
    fn peek(&self) -> Option<&Entry<T>> {
        let first = self.sorted.front();
        // `None` is less than any entry.
        if self.others.is_empty() { first } else { first.max(self.others.peek()) }
    }

    #[inline]
    fn pop(&mut self) -> Option<Entry<T>> {
        if self.others.is_empty() || self.sorted.front() > self.others.peek() {
            self.sorted.pop_front()
        } else {
            self.others.pop()
        }
    }

    fn is_empty(&self) -> bool {
        self.sorted.is_empty() && self.others.is_empty()
    }

    fn len(&self) -> usize {
        self.sorted.len() + self.others.len()
    }
}

/// A run queue. It allocates when it is made and never again. All steps take a time that grows
/// with the logarithm of the length at most.
pub struct RunQueue<T> {
    /// Those that other CPUs may take, and those that have to stay: apart, so that the first
    /// movable one is found without a search.
    movable: Lane<T>,
    fixed: Lane<T>,
    capacity: usize,
    pushed: u64,
}

impl<T> RunQueue<T> {
    /// An empty one, for `capacity` items.
    pub fn new(capacity: usize) -> Self {
        let lane = || Lane::new(capacity);
        Self { movable: lane(), fixed: lane(), capacity, pushed: 0 }
    }

    /// Adds an item; `movable` says whether other CPUs may have it.
    ///
    /// # Panics
    ///
    /// If the queue is full: a mistake of ours.
    pub fn push(&mut self, vruntime: u64, movable: bool, item: T) {
        assert!(self.len() < self.capacity, "run queue: more than {} items", self.capacity);
        let lane = if movable { &mut self.movable } else { &mut self.fixed };
        lane.push(Entry { vruntime, order: self.pushed, item });
        self.pushed += 1;
    }

    /// Takes the item with the smallest virtual time, and among equals the one that came first.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        let from_movable = self.fixed.is_empty() || self.movable.peek() > self.fixed.peek();
        let lane = if from_movable { &mut self.movable } else { &mut self.fixed };
        lane.pop().map(|entry| (entry.vruntime, entry.item))
    }

    /// A push and a pop: for the item that has just had its turn, and may be the next again.
    pub fn push_pop(&mut self, vruntime: u64, movable: bool, item: T) -> (u64, T) {
        if self.peek().is_none_or(|first| first > vruntime) {
            return (vruntime, item);
        }
        self.push(vruntime, movable, item);
        self.pop().expect("one was pushed just now")
    }

    /// The smallest virtual time.
    #[inline]
    pub fn peek(&self) -> Option<u64> {
        let movable = self.movable.peek();
        let first = if self.fixed.is_empty() { movable } else { movable.max(self.fixed.peek()) };
        first.map(|entry| entry.vruntime)
    }

    /// Takes the first movable item if `accept` says yes. The others are not looked at.
    pub fn pop_movable(&mut self, accept: impl FnOnce(&T) -> bool) -> Option<(u64, T)> {
        let first = self.movable.peek()?;
        let entry = if accept(&first.item) { self.movable.pop() } else { None };
        entry.map(|entry| (entry.vruntime, entry.item))
    }

    /// The first movable item.
    pub fn peek_movable(&self) -> Option<(u64, &T)> {
        self.movable.peek().map(|entry| (entry.vruntime, &entry.item))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.movable.len() + self.fixed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadlines::tests::Random;

    #[test]
    fn a_push_and_a_pop_in_one_are_the_same_as_both() {
        let mut random = Random::new();
        let (mut one, mut two) = (RunQueue::new(9), RunQueue::new(9));
        for number in 0..5_000 {
            let (vruntime, movable) = (random.below(20), random.below(3) != 0);
            if random.below(3) == 0 {
                assert_eq!(one.pop(), two.pop());
            } else if one.len() < 8 && random.below(2) == 0 {
                one.push(vruntime, movable, number);
                two.push(vruntime, movable, number);
            } else {
                let popped = one.push_pop(vruntime, movable, number);
                two.push(vruntime, movable, number);
                assert_eq!(Some(popped), two.pop());
            }
            assert_eq!((one.len(), one.peek()), (two.len(), two.peek()));
        }
    }

    #[test]
    fn the_smallest_comes_first_and_among_equals_the_first() {
        let mut queue = RunQueue::new(5);
        assert_eq!((queue.peek(), queue.pop()), (None, None));
        for (vruntime, movable, item) in
            [(7, true, 'a'), (3, false, 'b'), (3, true, 'c'), (7, false, 'd'), (1, false, 'e')]
        {
            queue.push(vruntime, movable, item);
        }
        assert_eq!((queue.len(), queue.peek()), (5, Some(1)));
        let all: String = core::iter::from_fn(|| queue.pop()).map(|(_, item)| item).collect();
        assert_eq!(all, "ebcad");
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn only_the_first_movable_one_is_looked_at() {
        let mut queue = RunQueue::new(4);
        queue.push(1, false, 'a');
        assert_eq!(queue.peek_movable(), None);
        assert_eq!(queue.pop_movable(|_| true), None);
        queue.push(3, true, 'b');
        queue.push(2, true, 'c');
        assert_eq!(queue.peek_movable(), Some((2, &'c')));
        assert_eq!(queue.pop_movable(|item| *item == 'b'), None);
        assert_eq!(queue.pop_movable(|item| *item == 'c'), Some((2, 'c')));
        assert_eq!(queue.pop_movable(|_| true), Some((3, 'b')));
        assert_eq!(queue.pop(), Some((1, 'a')));
    }

    #[test]
    fn it_does_what_a_sorted_list_does_and_never_grows() {
        let mut random = Random::new();
        let mut queue = RunQueue::new(40);
        let of = |lane: &Lane<u64>| (lane.sorted.capacity(), lane.others.capacity());
        let capacities = |queue: &RunQueue<u64>| (of(&queue.movable), of(&queue.fixed));
        let before = capacities(&queue);
        // Virtual time, item, movable; stable when sorted by time.
        let mut model: Vec<(u64, u64, bool)> = Vec::new();
        for item in 0..20_000 {
            let step = random.below(8);
            if step < 4 && model.len() < 40 {
                let (vruntime, movable) = (random.below(20), random.below(2) == 0);
                queue.push(vruntime, movable, item);
                model.push((vruntime, item, movable));
                model.sort_by_key(|entry| entry.0);
            } else if step < 6 {
                let expected = (!model.is_empty()).then(|| model.remove(0));
                assert_eq!(queue.pop(), expected.map(|entry| (entry.0, entry.1)));
            } else {
                let first = model.iter().position(|entry| entry.2);
                let yes = |item: &u64| item.is_multiple_of(2);
                let expected = first.filter(|index| yes(&model[*index].1));
                let expected = expected.map(|index| model.remove(index));
                assert_eq!(queue.pop_movable(yes), expected.map(|entry| (entry.0, entry.1)));
            }
            assert_eq!(queue.len(), model.len());
            assert_eq!(queue.peek(), model.first().map(|entry| entry.0));
            let movable = model.iter().find(|entry| entry.2);
            assert_eq!(queue.peek_movable(), movable.map(|entry| (entry.0, &entry.1)));
        }
        assert_eq!(capacities(&queue), before);
    }

    #[test]
    #[should_panic(expected = "more than 1 items")]
    fn too_many_are_a_mistake_of_ours() {
        let mut queue = RunQueue::new(1);
        queue.push(0, true, ());
        queue.push(0, false, ());
    }
}
