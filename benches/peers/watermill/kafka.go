package main

import (
	"context"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/ThreeDotsLabs/watermill/message"
)

type kafkaBroker struct{ address string }

var marshaler = kafka.NewWithPartitioningMarshaler(func(_ string, m *message.Message) (string, error) {
	return m.Metadata.Get("key"), nil
})

func (k kafkaBroker) admin() sarama.ClusterAdmin {
	return must(sarama.NewClusterAdmin([]string{k.address}, nil))
}

func (k kafkaBroker) remove(name string) { check(k.admin().DeleteTopic(name)) }
func (k kafkaBroker) declare(name string) {
	check(k.admin().CreateTopic(name, &sarama.TopicDetail{NumPartitions: 4, ReplicationFactor: 1}, false))
}

// By default 1.2 k. Publish sends one message at a time, and sarama makes batches of what waits while requests are on
// their way, so tuned has many goroutines: 1000 have a key each, which keeps its order. As rounds went from 30 k to
// 147 k, these are CPU time of client and broker in µs a message, and the better rounds. Goroutines/producers: 250/1 26,
// 61 k; 1000/1 18.5, 74 k; 4000/1 17.5, 87 k; 1000/2 19, 110 k (kept); 1000/4 25, 62 k. 1000/1 with Flush.Frequency 1 ms
// 18, 80 k, 5 ms 16.5, 61 k; Flush.Messages, ChannelBufferSize, newest protocol, one request in flight: no difference.
func (k kafkaBroker) publishing(mode string) (publishers []message.Publisher, goroutines, batch int) {
	producer := kafka.DefaultSaramaSyncPublisherConfig()
	producer.Producer.RequiredAcks = sarama.WaitForAll // Not its default.
	config := kafka.PublisherConfig{Brokers: []string{k.address}, Marshaler: marshaler, OverwriteSaramaConfig: producer}
	goroutines, producers := 1, 1
	if mode == "tuned" {
		goroutines, producers = 1000, 2
	}
	for range producers {
		publishers = append(publishers, must(kafka.NewPublisher(config, watermill.NopLogger{})))
	}
	return publishers, goroutines, 1
}

// One subscription has all 4 partitions, each with a goroutine that waits for the ack of its message. Offsets are
// committed every second, by default, so the last commit does not count. Quietest rounds of 200,000 or 300,000: as it
// comes 162 k, ChannelBufferSize 4096 228 k (tuned), 4 goroutines that ack 158 k, larger fetches 195 k, Fetch.Min 100 kB
// 187 k. 2 or 4 subscriptions 209 k, but their members join one after the other, and messages came twice.
func (k kafkaBroker) subscribe(mode, name string) (message.Subscriber, []<-chan *message.Message) {
	consumer := kafka.DefaultSaramaSubscriberConfig()
	consumer.Consumer.Offsets.Initial = sarama.OffsetOldest
	if mode == "tuned" {
		consumer.ChannelBufferSize = 4096
	}
	config := kafka.SubscriberConfig{Brokers: []string{k.address}, Unmarshaler: marshaler, OverwriteSaramaConfig: consumer}
	config.ConsumerGroup = name
	subscriber := must(kafka.NewSubscriber(config, watermill.NopLogger{}))
	return subscriber, []<-chan *message.Message{must(subscriber.Subscribe(context.Background(), name))}
}

// unacked is what the group has not committed.
func (k kafkaBroker) unacked(name string, count int) int {
	for _, partition := range must(k.admin().ListConsumerGroupOffsets(name, nil)).Blocks[name] {
		count -= int(max(partition.Offset, 0))
	}
	return count
}
