use crate::Result;
use async_trait::async_trait;

/// What a broker knows of the members of a group and of who has which partition, where it leaves it to them to share. A
/// lease is whatever it gives to one member at a time, and takes back from one that has died.
#[async_trait]
pub trait Leases: Send {
    /// How many members there are, this one included.
    async fn members(&mut self) -> Result<usize>;

    /// Whether some member [says](Leases::say_short) that it has less than its part.
    async fn is_any_short(&mut self) -> Result<bool>;

    /// Says whether this member has less than its part, for as long as it lives or until it says otherwise. Said again and
    /// again: only what has changed need be told to the broker.
    async fn say_short(&mut self, is_short: bool) -> Result<()>;

    /// Takes a partition and begins with it; `false` if somebody else has it, or it cannot be had just now.
    async fn take(&mut self, partition: usize) -> Result<bool>;
}

/// The least and the most partitions that a member holds where all of so many members hold as many as the others, or one more.
#[must_use]
pub fn fair_share(partitions: usize, members: usize) -> (usize, usize) {
    let members = members.max(1);
    (partitions / members, partitions.div_ceil(members))
}

/// Takes what is free of this member's part of `0..partitions`, beginning at `first`, which is better another for each member;
/// gives how many of those that stay it is to hand over to others. Called every so often, by each member for itself.
///
/// `held` are the partitions it has, of which `staying` are not on their way to somebody else. Where the parts cannot be equal
/// and a member gets less than the least of them, one that has the most hands one over.
///
/// # Errors
/// As those of the leases. Dropped before it ends, what was taken is kept.
pub async fn balance(
    leases: &mut impl Leases,
    partitions: usize,
    first: usize,
    held: &[usize],
    staying: usize,
) -> Result<usize> {
    let (least, most) = fair_share(partitions, leases.members().await?);
    // Not everyone who may hand one over does.
    let hands_one_over = least < most && staying == most && leases.is_any_short().await? && fastrand::bool();
    let keeps = if hands_one_over { least } else { most };
    let mut has = held.len();
    for partition in (0..partitions).map(|n| (first.wrapping_add(n)) % partitions) {
        if has >= keeps {
            break;
        }
        if !held.contains(&partition) && leases.take(partition).await? {
            has += 1;
        }
    }
    leases.say_short(has < least).await?;
    Ok(staying.saturating_sub(keeps))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    /// A broker: who has each partition, and who says it has too little.
    struct Broker {
        owners: Vec<Option<usize>>,
        members: Vec<bool>,
        short: Vec<bool>,
    }

    struct One<'a>(&'a mut Broker, usize);

    #[async_trait]
    impl Leases for One<'_> {
        async fn members(&mut self) -> Result<usize> {
            Ok(self.0.members.iter().filter(|is_there| **is_there).count())
        }
        async fn is_any_short(&mut self) -> Result<bool> {
            Ok(self.0.short.contains(&true))
        }
        async fn say_short(&mut self, is_short: bool) -> Result<()> {
            self.0.short[self.1] = is_short;
            Ok(())
        }
        async fn take(&mut self, partition: usize) -> Result<bool> {
            let is_free = self.0.owners[partition].is_none();
            if is_free {
                self.0.owners[partition] = Some(self.1);
            }
            Ok(is_free)
        }
    }

    impl Broker {
        fn of(&self, member: usize) -> Vec<usize> {
            let owned = self.owners.iter().enumerate();
            owned
                .filter(|(_, owner)| **owner == Some(member))
                .map(|(p, _)| p)
                .collect()
        }

        /// Each member once; what is handed over is free for the next.
        fn round(&mut self) {
            for member in (0..self.members.len()).filter(|m| self.members[*m]).collect::<Vec<_>>() {
                let (partitions, held) = (self.owners.len(), self.of(member));
                let mut one = One(self, member);
                let balanced = balance(&mut one, partitions, member * 7, &held, held.len());
                let handed_over = balanced
                    .now_or_never()
                    .expect("nothing is waited for")
                    .expect("no error");
                for partition in held.into_iter().take(handed_over) {
                    self.owners[partition] = None;
                }
            }
        }

        /// How many rounds it takes until everyone has its part.
        fn settle(&mut self) -> usize {
            let there: Vec<usize> = (0..self.members.len()).filter(|m| self.members[*m]).collect();
            let (least, most) = fair_share(self.owners.len(), there.len());
            for rounds in 0..200 {
                let is_fair = there.iter().all(|m| (least..=most).contains(&self.of(*m).len()));
                if is_fair && self.owners.iter().all(Option::is_some) {
                    return rounds;
                }
                self.round();
            }
            panic!("{:?} of {} members", self.owners, there.len());
        }
    }

    #[test]
    fn members_come_to_have_their_parts() {
        for partitions in [1, 3, 8, 64] {
            let mut broker = Broker {
                owners: vec![None; partitions],
                members: vec![false; 12],
                short: vec![false; 12],
            };
            let mut longest = 0;
            for n in 0..12 {
                broker.members[n] = true;
                longest = longest.max(broker.settle());
            }
            // The dead have nothing any more, and say nothing.
            for n in [5, 0, 11, 7, 3, 9] {
                broker.members[n] = false;
                broker.short[n] = false;
                let of_it = broker.of(n);
                of_it.into_iter().for_each(|partition| broker.owners[partition] = None);
                longest = longest.max(broker.settle());
            }
            println!("{partitions} partitions: at most {longest} rounds");
        }
    }

    #[test]
    fn nothing_moves_once_all_have_their_parts() {
        let mut broker = Broker {
            owners: vec![None; 8],
            members: vec![true; 5],
            short: vec![false; 5],
        };
        broker.settle();
        // Whoever was short has to say first that it is not.
        broker.round();
        let before = broker.owners.clone();
        for _ in 0..50 {
            broker.round();
            assert_eq!(broker.owners, before);
        }
    }
}
