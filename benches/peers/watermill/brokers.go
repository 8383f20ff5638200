package main

import (
	"context"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp091 "github.com/rabbitmq/amqp091-go"
)

type rabbitMQ struct{ url string }

var quiet = watermill.NopLogger{}

// config is Watermill's own for durable queues and persistent messages, but with quorum queues and confirms.
func (r rabbitMQ) config() amqp.Config {
	config := amqp.NewDurableQueueConfig(r.url)
	config.Queue.Arguments = amqp091.Table{amqp091.QueueTypeArg: amqp091.QueueTypeQuorum}
	config.Publish.ConfirmDelivery = true
	return config
}

// By default Watermill opens a channel for every message: 0.2 k. A channel of its carries one unconfirmed message, so
// tuned has a pool with a channel for each goroutine. Goroutines/connections: 64/1 6.0 k, 250/1 8.1 k, 1000/1 7.4 k,
// 250/2 8.8 k, 250/4 9.2 k, 500/4 9.3 k, 1000/4 9.8 k (kept), 2000/4 8.0 k (medians of 4 x 25,000).
//
// Transactional commits once a call of Publish, and the broker answers when the quorum queue has confirmed all of it: as
// safe, for callers that have batches. Goroutines x batch: 256 x 1 6.1 k, 1 x 1000 12.4 k, 4 x 250 15.7 k, 16 x 200
// 18.1 k (kept), 64 x 100 16.6 k.
func (r rabbitMQ) publishing(mode string) (publishers []message.Publisher, goroutines, batch int) {
	config, connections := r.config(), 1
	goroutines, batch = 1, 1
	switch mode {
	case "tuned":
		goroutines, connections = 1000, 4
		config.Publish.ChannelPoolSize = goroutines / connections
	case "transactional":
		goroutines, batch = 16, 200
		config.Publish.ChannelPoolSize = goroutines
		config.Publish.ConfirmDelivery, config.Publish.Transactional = false, true // A channel cannot have both.
	}
	for range connections {
		publishers = append(publishers, must(amqp.NewPublisher(config, quiet)))
	}
	return publishers, goroutines, batch
}

// By default it has a prefetch of 1: 0.8 k. A subscription hands out one message at a time, and acks each. Prefetch x
// subscriptions: 1000 x 4 25.9 k (kept), 5000 x 1 24.5 k, 5000 x 2 24.9 k (medians of 12 x 50,000). Earlier, when that
// was 20 to 23 k: 100 x 1 10 k, 1000 x 1 18 k, 1000 x 16 18.8 k, 2000 x 1 19.6 k, 2000 x 4 15.9 k, 5000 x 1 18.7 k.
func (r rabbitMQ) subscribe(mode, name string) (message.Subscriber, []<-chan *message.Message) {
	config, subscriptions := r.config(), make([]<-chan *message.Message, 1)
	if mode == "tuned" {
		config.Consume.Qos.PrefetchCount, subscriptions = 1000, make([]<-chan *message.Message, 4)
	}
	subscriber := must(amqp.NewSubscriber(config, quiet))
	for i := range subscriptions {
		subscriptions[i] = must(subscriber.Subscribe(context.Background(), name))
	}
	return subscriber, subscriptions
}

func (r rabbitMQ) declare(name string) {
	check(must(amqp.NewSubscriber(r.config(), quiet)).SubscribeInitialize(name))
}
func (r rabbitMQ) channel() *amqp091.Channel { return must(must(amqp091.Dial(r.url)).Channel()) }
func (r rabbitMQ) remove(name string)        { must(r.channel().QueueDelete(name, false, false, false)) }
func (r rabbitMQ) unacked(name string, _ int) int {
	return must(r.channel().QueueDeclarePassive(name, true, false, false, false, r.config().Queue.Arguments)).Messages
}

type kafkaBroker struct{ address string }

var marshaler = kafka.NewWithPartitioningMarshaler(func(_ string, m *message.Message) (string, error) {
	return m.Metadata.Get("key"), nil
})

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
		publishers = append(publishers, must(kafka.NewPublisher(config, quiet)))
	}
	return publishers, goroutines, 1
}

// One subscription has all 4 partitions, each with a goroutine that waits for the ack of its message. The commit once a
// second, as it comes, may be after the clock. Nothing helped beyond noise; medians of 5 x 200,000 and of 5 x 300,000: as it
// comes 129 k and 84 k, ChannelBufferSize 4096 104 k and 87 k (kept, for the least CPU time), 4 goroutines that ack 90 k,
// 4 subscriptions 128 k and 87 k, but their members join one after the other, and messages came twice.
func (k kafkaBroker) subscribe(mode, name string) (message.Subscriber, []<-chan *message.Message) {
	consumer := kafka.DefaultSaramaSubscriberConfig()
	consumer.Consumer.Offsets.Initial = sarama.OffsetOldest
	if mode == "tuned" {
		consumer.ChannelBufferSize = 4096
	}
	config := kafka.SubscriberConfig{Brokers: []string{k.address}, Unmarshaler: marshaler, OverwriteSaramaConfig: consumer}
	config.ConsumerGroup = name
	subscriber := must(kafka.NewSubscriber(config, quiet))
	return subscriber, []<-chan *message.Message{must(subscriber.Subscribe(context.Background(), name))}
}

func (k kafkaBroker) admin() sarama.ClusterAdmin {
	return must(sarama.NewClusterAdmin([]string{k.address}, sarama.NewConfig()))
}
func (k kafkaBroker) remove(name string) { check(k.admin().DeleteTopic(name)) }
func (k kafkaBroker) declare(name string) {
	check(k.admin().CreateTopic(name, &sarama.TopicDetail{NumPartitions: 4, ReplicationFactor: 1}, false))
}
func (k kafkaBroker) unacked(name string, count int) int {
	for _, partition := range must(k.admin().ListConsumerGroupOffsets(name, nil)).Blocks[name] {
		count -= int(max(partition.Offset, 0))
	}
	return count
}
