package main

import (
	"context"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp091 "github.com/rabbitmq/amqp091-go"
)

type rabbitMQ struct{ url string }

// config is Watermill's own for durable queues and persistent messages, but with quorum queues and confirms.
func (r rabbitMQ) config() amqp.Config {
	config := amqp.NewDurableQueueConfig(r.url)
	config.Queue.Arguments = amqp091.Table{amqp091.QueueTypeArg: amqp091.QueueTypeQuorum}
	config.Publish.ConfirmDelivery = true
	return config
}

func (r rabbitMQ) declare(name string) {
	check(must(amqp.NewSubscriber(r.config(), watermill.NopLogger{})).SubscribeInitialize(name))
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
		publishers = append(publishers, must(amqp.NewPublisher(config, watermill.NopLogger{})))
	}
	return publishers, goroutines, batch
}

// By default it has a prefetch of 1: 0.8 k. A subscription hands out one message at a time, and acks each. Prefetch x
// subscriptions: 100 x 1 10 k, 1000 x 1 18 k, 1000 x 4 20.3 k (kept), 1000 x 16 18.8 k, 2000 x 1 19.6 k, 2000 x 4
// 15.9 k, 5000 x 1 18.7 k, 20,000 x 1 16.7 k, 5000 x 4 on 4 connections 13.7 k (medians of 3 or 5 x 40,000 or 60,000).
func (r rabbitMQ) subscribe(mode, name string) (message.Subscriber, []<-chan *message.Message) {
	config, subscriptions := r.config(), make([]<-chan *message.Message, 1)
	if mode == "tuned" {
		config.Consume.Qos.PrefetchCount, subscriptions = 1000, make([]<-chan *message.Message, 4)
	}
	subscriber := must(amqp.NewSubscriber(config, watermill.NopLogger{}))
	for i := range subscriptions {
		subscriptions[i] = must(subscriber.Subscribe(context.Background(), name))
	}
	return subscriber, subscriptions
}

func (r rabbitMQ) channel() *amqp091.Channel { return must(must(amqp091.Dial(r.url)).Channel()) }
func (r rabbitMQ) remove(name string)        { must(r.channel().QueueDelete(name, false, false, false)) }

// unacked is what is back in the queue.
func (r rabbitMQ) unacked(name string, _ int) int {
	return must(r.channel().QueueDeclarePassive(name, true, false, false, false, r.config().Queue.Arguments)).Messages
}
